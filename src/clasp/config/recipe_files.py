"""The files of a recipe, merged but not yet checked against the settings; and overrides as typed.

Input: a file (or a name from ``recipes/``) and strings such as ``train.batch_size=512``. Output: a ``RecipeFile``. A
file may begin with ``extends = "lilt/lwa"`` and then has only the keys that differ. Note: nothing here imports torch,
so that a recipe that does not exist is refused at once.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clasp.data.formats.setting_hints import suggest_key
from clasp.errors import UserError


class Override(NamedTuple):
    """An override: its key, the text of its value, and both as typed."""

    key: str
    text: str
    typed: str


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """What was read: the recipe as typed, its tables, the chain of files for errors, and the overrides."""

    source: str
    given: dict[str, Any]
    chain: str
    overrides: tuple[Override, ...]


def read_recipe_file(source: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read a recipe file, or a built-in recipe by its name (``start``, ``lilt/lwa``), and those that it extends.

    Raises ``UserError`` naming the nearest recipes, and for an override that is not ``key=value``.
    """
    given, chain = _read_with_extends(_find(source, Path()), str(source))
    return RecipeFile(str(source), given, chain, parse_overrides(overrides))


def parse_overrides(overrides: Sequence[str]) -> tuple[Override, ...]:
    """Keys and values apart. Raises ``UserError`` for an override that is not ``key=value``."""
    parsed = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            given_keys = [text.partition("=")[0].strip() for text in overrides if "=" in text]
            hint = suggest_key(override, ("data.train", "data.val"), given_keys)
            raise UserError(f"override {override!r} is not key=value{hint or ', such as train.batch_size=512'}")
        parsed.append(Override(key.strip(), text, override))
    return tuple(parsed)


def require_single_keys(typed: Sequence[str]) -> None:
    """Raise ``UserError`` for a key that stands twice in what was typed; in Python, the last of several counts."""
    seen: dict[str, str] = {}
    for override in typed:
        key = override.partition("=")[0].strip()
        if key in seen:
            raise UserError(f"override {override!r}: {key} is given twice, first as {seen[key]!r}")
        seen[key] = override


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with clasp, by name."""
    package = Path(__file__).parents[1]
    folder = next((f for f in (package / "recipes", package.parents[1] / "recipes") if f.is_dir()), None)
    if folder is None:
        return {}
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.toml"))}


def _find(source: str | Path, folder: Path) -> Path:
    path = folder / source
    if os.path.isfile(path):  # unlike Path.is_file, also False for a name that is too long
        return path
    builtin = builtin_recipes()
    name = str(source).removesuffix(".toml").removeprefix("recipes/")
    if name in builtin:
        return builtin[name]
    near = difflib.get_close_matches(name, builtin, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UserError(
        f"no recipe {str(source)!r}: neither a file nor one of these{_as_data(source)}; {hint}{', '.join(builtin)}"
    )


def _as_data(source: str | Path) -> str:
    """What to type for a path of pairs in the place of a recipe; empty for any other word."""
    return suggest_key(str(source), ("start data.train",), ())


def _read_with_extends(path: Path, chain: str, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """A file as nested dictionaries, merged over the files it extends, and the chain of files as text.

    ``above``: the files that extend this one. Raises ``UserError`` naming the chain.
    """
    if path.resolve() in above:
        raise UserError(f"{chain}: no recipe can extend itself")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        hint = "" if path.suffix == ".toml" else _as_data(path)
        raise UserError(f"{path} is not a TOML file: {error}{hint}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if "extends" not in given:
        return given, chain
    name = given.pop("extends")
    if not isinstance(name, str):
        raise UserError(f"{chain}: extends = {name!r} should be the name of one recipe, or a path from {path.parent}")
    chain = f"{chain} extends {name}"
    try:
        found = _find(name, path.parent)
    except UserError as error:
        raise UserError(f"{chain}: {error}") from None
    below, chain = _read_with_extends(found, chain, (*above, path.resolve()))
    return _merge(below, given), chain


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge sections key by key; other values that both have are taken from ``above``."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merge(below[key], above[key])
    return merged
