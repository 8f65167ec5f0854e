"""A run as data: one TOML file, changed by dotted overrides, checked whole before anything is computed.

In goes a file (or a name from ``recipes/``) and strings such as ``train.batch=512``; out comes a frozen ``Recipe``. Each
section's settings live beside what they configure; here they are only put together. An unknown key or value is one
error that names the nearest valid ones.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clasp.data.images import Augment
from clasp.data.pairs import Columns
from clasp.losses import LOSSES
from clasp.model import HeadSettings
from clasp.nn.towers import ImageSettings, TextSettings
from clasp.nn.tuning import parse
from clasp.train.plan import TrainSettings
from clasp.types import UserError


class TuneSettings(BaseModel):
    """``[tune]``: what trains, per tower; see ``clasp.nn.tuning``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: list[str] = Field(default=["none"], min_length=1)
    """Methods for the image tower"""
    text: list[str] = Field(default=["none"], min_length=1)
    """Methods for the text tower"""
    head: Literal["full", "none"] = "full"
    """The heads, with a learned pooling where there is one"""
    scale: Literal["full", "none"] = "full"
    """The scale and the bias of the logits"""


class LossSettings(BaseModel):
    """``[loss]``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["infonce", "sigmoid"] = "infonce"
    """A key of ``clasp.losses.LOSSES``"""


class DataSettings(BaseModel):
    """``[data]``: which pairs, and how they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    train: str | None = None
    """A folder, a .csv .tsv .jsonl .parquet .json file, or tar shards"""
    val: str | None = None
    """Pairs to validate on; where left out, a part of ``train`` is set aside by a stable hash of each pair's group"""
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the groups set aside when ``val`` is left out"""
    image_root: str | None = None
    """Folder that relative image paths start from; the folder of the file where left out"""
    columns: Columns = Columns()
    """Names of the columns; each format's usual ones where left out"""
    languages: list[str] = []
    """Keep captions in these languages only; all where empty"""
    captions: Literal["draw", "all"] = "draw"
    """draw: one caption of each pair in each epoch; all: every caption is a sample of its own"""
    augment: Augment | None = None
    """Changes to training images; the defaults of each field change nothing"""
    features: Literal["auto", "off"] = "auto"
    """auto: what a wholly frozen tower says of an input is computed once and kept"""
    max_bad_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of unreadable samples past which the run stops"""


class Recipe(BaseModel):
    """Everything that decides a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: ImageSettings
    text: TextSettings
    tune: TuneSettings = TuneSettings()
    head: HeadSettings = HeadSettings()
    loss: LossSettings = LossSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()

    def changed(self, overrides: Sequence[str]) -> Recipe:
        """This recipe with dotted overrides applied."""
        return from_dict(_overridden(self.to_dict(), overrides), "the overrides")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        """The recipe as a file that reads back equal."""
        return tomlkit.dumps(self.to_dict())


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one of clasp's own by its name (``start``, ``lilt/lwa``), and apply overrides.

    Raises ``UserError`` naming the nearest valid key or value.
    """
    path = _find(source)
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML file: {error}") from None
    return from_dict(_overridden(given, overrides), str(source))


def from_dict(given: dict[str, Any], source: str) -> Recipe:
    """Check a recipe given as nested dictionaries; ``source`` is named in errors."""
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as error:
        raise UserError(f"{source}: {_plainly(error)}") from None
    for spec in (*recipe.tune.image, *recipe.tune.text):
        parse(spec)
    assert set(LOSSES) == set(get_args(LossSettings.model_fields["kind"].annotation))
    return recipe


def shipped() -> dict[str, Path]:
    """The recipes that come with clasp, by name."""
    here = Path(__file__).parent
    folder = next((f for f in (here / "recipes", here.parents[1] / "recipes") if f.is_dir()), None)
    if folder is None:
        return {}
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.toml"))}


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    own = shipped()
    name = str(source).removesuffix(".toml").removeprefix("recipes/")
    if name in own:
        return own[name]
    near = difflib.get_close_matches(name, own, n=3, cutoff=0.4)
    raise UserError(f"no recipe {str(source)!r}: not a file, and clasp's own are {', '.join(near or own)}")


def _overridden(given: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``train.batch=512`` and the like, put into nested dictionaries. Values read as TOML; a bare word is a string."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in given.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {override!r} is not key=value, such as train.batch=512")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *path, last = key.strip().split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UserError(f"override {override!r}: {part} is a value, not a section")
        place[last] = value
    return result


# --- errors a person can act on --------------------------------------------------------------------------------------


def _plainly(error: ValidationError) -> str:
    """The first mistake of a validation, with the nearest valid names."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    if first["type"] == "extra_forbidden":
        keys = known_keys()
        near = difflib.get_close_matches(key, keys, n=2, cutoff=0.5)
        section = [name for name in keys if name.rpartition(".")[0] == key.rpartition(".")[0]]
        return f"unknown key {key!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"valid keys: {', '.join(section or keys)}")
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "literal_error":
        expected = str(first.get("ctx", {}).get("expected", ""))
        return f"{key} = {first['input']!r} is not one of {expected}"
    return f"{key} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"


def _is_branch(part: Any) -> bool:
    """pydantic names the branch of a union in the location; people do not."""
    return isinstance(part, str) and (part in ("int", "float", "str", "constrained-int") or "[" in part)


def known_keys() -> list[str]:
    """Every dotted key of a recipe."""
    keys = []
    for section, field in Recipe.model_fields.items():
        settings = field.annotation
        assert isinstance(settings, type) and issubclass(settings, BaseModel)
        keys.append(section)
        keys += [f"{section}.{name}" for name in settings.model_fields]
    return keys
