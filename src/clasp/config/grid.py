"""A grid of settings as recipes: every combination of the values given for some keys.

In go a recipe, overrides and texts such as ``train.lr=1e-3,3e-3``; out come ``GridPoint``s, each a checked recipe
with a name for its run. Unusual: a name is made of its own values only, so it stays when others are added to the grid.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clasp.config.recipe import Recipe, read_recipe
from clasp.types import UserError

_MAX_NAME_LENGTH = 120  # file systems allow 255 bytes
_OPEN, _CLOSED = "[{(", "]})"


@dataclass(frozen=True, slots=True)
class GridSpec:
    """What was typed: a recipe, overrides, and ``key=value,value`` for each axis of the grid."""

    source: str
    overrides: Sequence[str]
    axes: Sequence[str]

    def expand(self) -> list[GridPoint]:
        """As ``expand_grid``."""
        return expand_grid(self.source, self.overrides, self.axes)


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One point of the grid: the name of its run, what the grid sets, and the recipe that this makes."""

    name: str
    settings: tuple[str, ...]
    recipe: Recipe

    def __str__(self) -> str:
        return " ".join(self.settings)


def expand_grid(source: str, overrides: Sequence[str], grid: Sequence[str]) -> list[GridPoint]:
    """Every combination as a checked recipe, the last key changing fastest. Raises ``UserError``."""
    axes = dict(parse_axis(text) for text in grid)
    counts = Counter([text.partition("=")[0].strip() for text in (*grid, *overrides)])
    twice = [key for key in axes if counts[key] > 1]
    if twice:
        raise UserError(f"{twice[0]} is set twice: a key stands in one --grid, and nowhere else")
    settings = [tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True)) for values in _product(axes)]
    made: list[GridPoint] = []
    for name, chosen in zip(_names(axes), settings, strict=True):
        with_these = f"with {' '.join(chosen)}"
        try:
            recipe = read_recipe(source, [*overrides, *chosen])
        except UserError as error:
            raise UserError(f"{with_these}: {error}") from None
        same = next((other for other in made if other.recipe == recipe), None)
        if same:
            raise UserError(f"{with_these}: this is the same recipe as with {same}")
        if made and _validation_data(recipe) != _validation_data(made[0].recipe):
            raise UserError(f"{with_these}: other pairs would be validated on than before; such runs cannot be ranked")
        made.append(GridPoint(name, chosen, recipe))
    return made


def parse_axis(text: str) -> tuple[str, list[str]]:
    """``train.lr=1e-3,3e-3``: a key and its values, each written as behind ``key=`` anywhere else.

    Commas separate, except inside brackets or quotes: ``tune.text=["norms"],["lora(rank=8)"]`` has two values.
    """
    key, equals, rest = text.partition("=")
    if not equals or not key.strip() or not rest.strip():
        raise UserError(f"--grid {text!r} is not key=value,value, such as train.lr=1e-3,3e-3")
    values, depth, quote = [""], 0, ""
    for letter in rest:
        if letter == "," and not depth and not quote:
            values.append("")
            continue
        values[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in _OPEN) - (letter in _CLOSED)
    values = [value.strip() for value in values]
    if depth or quote or "" in values:
        raise UserError(f"--grid {text!r}: a value is empty, or a bracket or quote is not closed")
    if len(values) == 1:
        raise UserError(
            f"--grid {text!r} has one value; separate values by commas outside of brackets, as in "
            f'train.lr=1e-3,3e-3 or tune.text=["norms"],["biases"]'
        )
    return key.strip(), values


def _product(axes: dict[str, list[str]]) -> list[tuple[str, ...]]:
    return list(itertools.product(*axes.values()))


def _names(axes: dict[str, list[str]]) -> list[str]:
    """A folder name for each combination, such as ``lr=1e-3,kind=mlp``; stable when values are added."""
    last = Counter(key.rpartition(".")[2] for key in axes)
    titles = [short if last[short := key.rpartition(".")[2]] == 1 else key for key in axes]
    names = []
    for values in _product(axes):
        plain = [re.sub(r"[^\w.+-]+", "-", re.sub(r"[\"'\[\]{}\s]", "", value)).strip("-") for value in values]
        names.append(",".join(f"{title}={value}" for title, value in zip(titles, plain, strict=True)))
    often = Counter(names)
    return [
        name
        if often[name] == 1 and len(name) <= _MAX_NAME_LENGTH
        else f"{name[:_MAX_NAME_LENGTH]}-{_short_hash(values)}"
        for name, values in zip(names, _product(axes), strict=True)
    ]


def _short_hash(values: Sequence[str]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:6]


def _validation_data(recipe: Recipe) -> tuple[Any, ...]:
    data = recipe.data
    asked = data.val or (data.train, data.val_fraction)
    return (asked, data.format, data.image_root, data.columns, data.languages)
