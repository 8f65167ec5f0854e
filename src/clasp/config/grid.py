"""A grid over settings: every combination of the values given for some keys, as recipes.

Input: a recipe, overrides and axes such as ``train.lr=1e-3,3e-3``. Output: ``GridPoint``s, each a validated recipe with
a name for its run. Note: a name depends on its own values only, so it is stable when values are added to the grid.
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
    """A grid as typed: a recipe, overrides, and ``key=value,value`` for each axis of the grid."""

    source: str
    overrides: Sequence[str]
    axes: Sequence[str]

    def expand(self) -> list[GridPoint]:
        """As ``expand_grid``."""
        return expand_grid(self.source, self.overrides, self.axes)


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One point of the grid: the name of its run, the grid's settings, and the resulting recipe."""

    name: str
    settings: tuple[str, ...]
    recipe: Recipe

    def __str__(self) -> str:
        return " ".join(self.settings)


def expand_grid(source: str, overrides: Sequence[str], grid: Sequence[str]) -> list[GridPoint]:
    """Every combination as a validated recipe, the last key changing fastest. Raises ``UserError``."""
    axes = dict(parse_axis(text) for text in grid)
    counts = Counter([text.partition("=")[0].strip() for text in (*grid, *overrides)])
    repeated = [key for key in axes if counts[key] > 1]
    if repeated:
        raise UserError(f"{repeated[0]} is set twice: a key stands in one --grid, and nowhere else")
    settings = [tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True)) for values in _product(axes)]
    points: list[GridPoint] = []
    for name, chosen in zip(_names(axes), settings, strict=True):
        prefix = f"with {' '.join(chosen)}"
        try:
            recipe = read_recipe(source, [*overrides, *chosen])
        except UserError as error:
            raise UserError(f"{prefix}: {error}") from None
        same = next((other for other in points if other.recipe == recipe), None)
        if same:
            raise UserError(f"{prefix}: this is the same recipe as with {same}")
        if points and _validation_data(recipe) != _validation_data(points[0].recipe):
            raise UserError(
                f"{prefix}: the validation pairs differ from those of the other runs; such runs cannot be ranked"
            )
        points.append(GridPoint(name, chosen, recipe))
    return points


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Parse ``train.lr=1e-3,3e-3``: a key and its values, each in the syntax of an override.

    Commas separate values, except inside brackets or quotes: ``tune.text=["norms"],["lora(rank=8)"]`` has two values.
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
    source = data.val or (data.train, data.val_fraction)
    return (source, data.format, data.image_root, data.columns, data.languages)
