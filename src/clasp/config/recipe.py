"""Recipes: one TOML file with dotted overrides, validated completely before anything is computed.

Input: a file (or a name from ``recipes/``) and strings such as ``train.batch_size=512``, read by ``recipe_files``.
Output: a frozen ``Recipe``. Each section's settings are defined beside what they configure; here they are combined, and
checked against each other. An unknown key or value is one error that names the nearest valid ones (``recipe_errors``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError

from clasp.config.budget import AutoSettings
from clasp.config.recipe_errors import explain_validation_error
from clasp.config.recipe_files import Override, RecipeFile, parse_overrides, read_recipe_file
from clasp.config.recipe_sections import DataSettings, LossSectionSettings, ShareSettings
from clasp.errors import UserError
from clasp.models.head_settings import HeadSettings
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.tuning.settings import TuneSettings
from clasp.training.settings import TrainSettings


class Recipe(BaseModel):
    """All settings of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: ImageTowerSettings
    text: TextTowerSettings
    share: ShareSettings | None = None
    tune: TuneSettings = TuneSettings()
    head: HeadSettings = HeadSettings()
    loss: LossSectionSettings = LossSectionSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    auto: AutoSettings | None = None

    def with_overrides(self, overrides: Sequence[str]) -> Recipe:
        """This recipe with dotted overrides applied."""
        return recipe_from_dict(_apply_overrides(self.to_dict(), parse_overrides(overrides)), "the overrides")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that are ``None``."""
        return self.model_dump(mode="json", exclude_none=True)

    def differs_from(self, other: dict[str, Any]) -> bool:
        """Whether ``other``, a recipe as ``to_dict`` returns it, may give other results; trackers do not matter."""
        ours, theirs = self.to_dict(), dict(other)
        theirs["train"] = dict(theirs.get("train", {}))
        for settings in (ours["train"], theirs["train"]):
            settings.pop("trackers", None)
        return ours != theirs

    def to_toml(self) -> str:
        """The recipe as a TOML file that reads back equal."""
        import tomlkit  # here, since reading a recipe does not need it

        return tomlkit.dumps(self.to_dict())


def read_recipe(
    source: str | Path, overrides: Sequence[str] = (), *, budget: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe file, or a built-in recipe by its name (``start``, ``lilt/lwa``), and apply overrides.

    ``budget`` replaces ``[auto]``: ``{"minutes": "30"}`` or ``{"steps": "500"}``.
    Raises ``UserError`` naming the nearest valid key or value.
    """
    return check_recipe_file(read_recipe_file(source, overrides), budget=budget)


def check_recipe_file(found: RecipeFile, *, budget: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a file that was read; ``budget`` and errors as of ``read_recipe``."""
    given = dict(found.given)
    if budget is not None:
        if "auto" not in given:
            raise UserError(f"{found.source} has no [auto] to spend a budget on; those that have: start, auto")
        given["auto"] = {key: _parse_value(f"auto.{key}", text) for key, text in budget.items()}
    typed = _apply_overrides(given, found.overrides)
    recipe = recipe_from_dict(typed, found.chain)
    if recipe.auto is not None:
        _refuse_planned(_planned_keys(typed), found.chain)
    return recipe


def recipe_from_dict(given: dict[str, Any], source: str) -> Recipe:
    """Check a recipe given as nested dictionaries; ``source`` is named in errors."""
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as error:
        raise UserError(f"{source}: {explain_validation_error(error, recipe_keys())}") from None
    if recipe.auto is not None:
        _check_auto(recipe, source)
    if recipe.head.init == "cca" and not (recipe.head.kind == "linear" and recipe.head.standardize):
        raise UserError(
            f"{source}: head.init = 'cca' needs head.kind = 'linear' and head.standardize = true or 'layer'"
        )
    if recipe.data.class_weight and recipe.head.init != "cca":
        raise UserError(
            f"{source}: data.class_weight = {recipe.data.class_weight:g} is for head.init = 'cca'; here head.init = "
            f"{recipe.head.init!r}"
        )
    if recipe.data.class_ratio is not None and (recipe.head.init != "cca" or recipe.data.class_weight == 0):
        found = "data.class_weight = 0" if recipe.data.class_weight == 0 else f"head.init = {recipe.head.init!r}"
        raise UserError(
            f"{source}: data.class_ratio = {recipe.data.class_ratio:g} is for head.init = 'cca' with class pairs; here "
            f"{found}"
        )
    if recipe.head.standardize and recipe.tune.head == "none":
        raise UserError(f"{source}: head.standardize = true fits the heads to the data, which needs tune.head = 'full'")
    if recipe.share is not None and recipe.head.init == "pretrained":
        raise UserError(
            f"{source}: head.init = 'pretrained' is for towers as their authors trained them; leave [share] out"
        )
    if recipe.share is not None and recipe.share.head == "shared" and recipe.head.standardize:
        raise UserError(
            f"{source}: head.standardize = true is of one tower's features; share.head = 'shared' is of both"
        )
    if recipe.share is None and (recipe.train.weight_decay_shared is not None or recipe.train.lr_factors.shared != 1):
        key = "weight_decay_shared" if recipe.train.weight_decay_shared is not None else "lr_factors.shared"
        raise UserError(f"{source}: train.{key} is for what two nets share, and there is no [share]")
    if recipe.train.batch_size != "auto":
        recipe.loss.require_batch_size(recipe.train.batch_size)
    _check_names(recipe)
    return recipe


def _check_names(recipe: Recipe) -> None:
    """Raise ``UserError`` for an unknown loss, tuning method or tracker; what is at its default needs no import."""
    if recipe.loss.kind != LossSectionSettings().kind:
        from clasp.training.losses import find_loss

        find_loss(recipe.loss.kind)
    specs, usual = [*recipe.tune.image, *recipe.tune.text], TuneSettings()
    if not {*specs} <= {*usual.image, *usual.text}:
        from clasp.models.tuning.spec import parse_tuning_spec

        for spec in specs:
            parse_tuning_spec(spec)
    if recipe.train.trackers:
        from clasp.training.trackers.registry import check_tracker_names

        check_tracker_names(recipe.train.trackers)


_PLANNED_TRAIN_KEYS = ("epochs", "max_steps", "lr", "lr_factors", "evaluate_every", "init_from", "init_parts")


def _check_auto(recipe: Recipe, source: str) -> None:
    """Raise ``UserError`` for settings that ``[auto]`` chooses, and for those that it cannot work with."""
    default = TuneSettings()
    chosen = [
        f"tune.{key}" for key in TuneSettings.model_fields if recipe.tune.model_dump()[key] != default.model_dump()[key]
    ]
    chosen += ["head"] if recipe.head != HeadSettings() else []
    ours, usual = recipe.train.model_dump(), TrainSettings().model_dump()
    chosen += [f"train.{key}" for key in _PLANNED_TRAIN_KEYS if ours[key] != usual[key]]
    _refuse_planned(chosen, source)
    learned = [f"{side}.pool" for side in ("image", "text") if recipe.model_dump()[side]["pool"] == "attention"]
    if learned:
        raise UserError(
            f"{source}: {learned[0]} = 'attention' is trained: [auto] compares closed forms on frozen towers"
        )
    if recipe.data.feature_cache == "off":
        raise UserError(f"{source}: data.feature_cache = 'off': [auto] compares closed forms on cached features")


def _planned_keys(typed: Mapping[str, Any]) -> list[str]:
    """The settings that are given of those that ``[auto]`` chooses, at their default too: it would not keep them."""
    train = [f"train.{key}" for key in _PLANNED_TRAIN_KEYS if key in typed.get("train", {})]
    return [f"tune.{key}" for key in typed.get("tune", {})] + [f"head.{key}" for key in typed.get("head", {})] + train


def _refuse_planned(keys: Sequence[str], source: str) -> None:
    if keys:
        raise UserError(
            f"{source}: {keys[0]} is chosen by [auto]; leave it out, or train a recipe without [auto], such as heads "
            "or lilt/lwa"
        )


def _apply_overrides(given: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """Apply overrides to nested dictionaries. Values are TOML or bare words."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in given.items()}
    for override in overrides:
        *path, last = override.key.split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UserError(f"override {override.typed!r}: {part} is a value, not a section")
        place[last] = _parse_value(override.key, override.text)
    return result


def _parse_value(key: str, text: str) -> Any:
    """The value of an override as TOML; for a string setting, ``2024`` stays a string."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    is_text = recipe_keys().get(key) in (str, str | None)
    return text if is_text and not isinstance(value, str) else value


def recipe_keys() -> dict[str, Any]:
    """Every dotted key of a recipe with its type; ``None`` for a section."""
    return dict(_keys(Recipe, ""))


def _keys(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    names = kind.model_fields if issubclass(kind, BaseModel) else [field.name for field in fields(kind)]
    hints = get_type_hints(kind)
    for name in names:
        key, annotation = f"{prefix}{name}", hints[name]
        section = next((part for part in (annotation, *get_args(annotation)) if _is_section(part)), None)
        yield key, None if section else annotation
        if section:
            yield from _keys(section, f"{key}.")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation))
