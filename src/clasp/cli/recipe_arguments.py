"""The recipe of a verb as typed, checked step by step: what can be refused without torch is refused before it.

Input: the name of a recipe, overrides, the name of a run. Output: the recipe, or a ``UserError``: of the files in half
a second, of keys and values in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clasp.config.recipe_files import RecipeFile, read_recipe_file, require_single_keys
from clasp.errors import UserError, require_printable_path

if TYPE_CHECKING:
    from clasp.config.recipe import Recipe


def require_run_name(runs: Path, name: str | None) -> None:
    """Raises ``UserError`` for a ``--name`` that is not that of one folder, or a folder that cannot be typed."""
    if name is not None and (not name.strip() or Path(name).name != name or name == ".."):
        raise UserError(f"--name {name!r} is not the name of one folder; its place is --runs")
    require_printable_path(runs / (name or ""))


def read_recipe_files(recipe: str, overrides: Sequence[str]) -> RecipeFile:
    """The files of a recipe, with overrides."""
    require_single_keys(overrides)
    return read_recipe_file(recipe, overrides)


def read_typed_recipe(recipe: str, overrides: Sequence[str], budget: Mapping[str, str] | None = None) -> Recipe:
    """The ``Recipe``; ``budget`` as of ``read_recipe``."""
    found = read_recipe_files(recipe, overrides)
    from clasp.config.recipe import check_recipe_file

    return check_recipe_file(found, budget=budget or None)


def require_pairs(recipe: Recipe) -> Recipe:
    """The same recipe. Raises ``UserError`` where its pairs are not there."""
    from clasp.config.datasets import require_sources

    require_sources(recipe.data)
    return recipe
