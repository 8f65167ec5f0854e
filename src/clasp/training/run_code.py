"""Python code that the recipe of a run names, such as ``image.tower = "package.module:factory"``.

Input: the recipe of a run folder, as plain data. Output: none, or a ``UserError`` that names the key, unless the caller
has allowed the code. Note: a recipe that the user gives to ``clasp train`` is trusted; a run folder is data, perhaps
somebody else's, and loading it must not import what it names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from clasp.plain_types import UserError

# keys whose value may be package.module:Name; a tuning method is the part of its spec before the options
_PLUGIN_KEYS = ("loss.kind", "train.schedule", "train.decay_filter", "data.format")
_allowed: ContextVar[Callable[[str], bool]] = ContextVar("allowed code", default=lambda name: False)


def code_names(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The dotted keys whose value names Python code, with the value; without trackers, which only training imports."""
    from clasp.models.zoo.registry import TOWER_SOURCES  # here, since it imports torch

    found: dict[str, str] = {}
    for side in ("image", "text"):
        tower = str(_value(recipe, f"{side}.tower") or "")
        if ":" in tower and tower.partition(":")[0] not in TOWER_SOURCES:
            found[f"{side}.tower"] = tower
        for number, spec in enumerate(_list(_value(recipe, f"tune.{side}"))):
            if ":" in (method := str(spec).partition("(")[0]):
                found[f"tune.{side}[{number}]"] = method.strip()
    for key in _PLUGIN_KEYS:
        if ":" in (name := str(_value(recipe, key) or "")):
            found[key] = name
    return found


def tracker_code_names(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The same of ``train.trackers``."""
    named = [str(name) for name in _list(_value(recipe, "train.trackers")) if ":" in str(name)]
    return {f"train.trackers[{number}]": name for number, name in enumerate(named)}


def all_code_names(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Both."""
    return code_names(recipe) | tracker_code_names(recipe)


@contextmanager
def allow_code(names: Collection[str] | None = None) -> Iterator[None]:
    """A block in which runs may import these names beside those allowed already; ``None``: any."""
    before = _allowed.get()
    token = _allowed.set(lambda name: names is None or name in names or before(name))
    try:
        yield
    finally:
        _allowed.reset(token)


def require_allowed(named: Mapping[str, str], where: Path) -> None:
    """Raises ``UserError`` for the first of ``named`` (key to name) that was not allowed; ``where``: the run."""
    for key, name in named.items():
        if not _allowed.get()(name):
            raise UserError(
                f"{where} names Python code, {key} = {name!r}, and a run is read as data; where you trust it, say so "
                "with --allow-code, or allow_code=True in Python"
            )


def _value(recipe: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    found = recipe.get(section)
    return found.get(name) if isinstance(found, Mapping) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
