"""The sections of a recipe that combine settings of several rooms: ``[share]``, ``[loss]`` and ``[data]``.

Input: what a TOML file has under them. Output: frozen settings. Note: the other sections are defined beside what they
configure.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from clasp.data.augment import Augment
from clasp.data.formats.rows import ColumnNames
from clasp.models.logit_settings import LogitSettings
from clasp.models.sharing.policy import SharingSettings
from clasp.models.sharing.trunk_settings import DEFAULT_TRUNK_PARTS, SingleTrunkSettings
from clasp.plain_types import MAX_COUNT
from clasp.plain_types import StorageDtype as StorageName
from clasp.training.loss_settings import LossSettings


class ShareSettings(SharingSettings):
    """``[share]``: weight sharing between the towers.

    Both are clasp's nets, untrained or trained with the same sharing; or ``trunk`` names the tower whose pre-trained
    blocks both modalities run through.
    """

    trunk: Literal["image", "text"] | None = None
    """The tower whose pre-trained blocks are the shared trunk; new parameters of the other tower always train"""
    embedding: Literal["tower", "random"] = "tower"
    """Initial patch or token embeddings of the other modality: those of its tower, or random"""
    patch: int = Field(default=16, ge=1, le=4096)
    """Patch side in pixels, where patch embeddings are random"""
    context: int = Field(default=77, ge=1, le=32_768)
    """Maximum tokens of a caption, where token embeddings are random"""

    @model_validator(mode="before")
    @classmethod
    def _default_trunk_sharing(cls, given: Any) -> Any:
        """With a trunk, attention and feed-forward parts are shared by default."""
        return {**DEFAULT_TRUNK_PARTS, **given} if isinstance(given, dict) and given.get("trunk") is not None else given

    @property
    def trunk_settings(self) -> SingleTrunkSettings | None:
        """The settings of the trunk; ``None`` without one."""
        if self.trunk is None:
            return None
        return SingleTrunkSettings(trunk=self.trunk, embedding=self.embedding, patch=self.patch, context=self.context)

    @property
    def policy(self) -> SharingSettings:
        """The sharing settings alone."""
        return SharingSettings(**self.model_dump(include=set(SharingSettings.model_fields)))


class LossSectionSettings(LogitSettings, LossSettings):
    """``[loss]``: the loss, and the logit scale and bias."""


class DataSettings(BaseModel):
    """``[data]``: the pairs and how they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    train: str | None = None
    """A folder, a file of a suffix in ``clasp.data.pairs.PAIR_FORMATS`` (.csv .jsonl .parquet …), tar shards, or a
    packaged sample (sample:emoji, sample:emoji-quick)"""
    val: str | None = None
    """Validation pairs; where left out, part of ``train`` is held out by a stable hash of each pair's group"""
    format: str | None = None
    """Format of ``train`` and ``val``: a key of ``PAIR_FORMATS``, or ``package.module:Name`` for a function from a
    ``SourceSpec`` to an ``OpenedSource`` (``clasp.data.formats.base``); by folder or suffix where left out"""
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of the groups held out when ``val`` is left out"""
    image_root: str | None = None
    """Folder that relative image paths start from; where left out, the folder of the file, and then no image path may
    lead out of it"""
    columns: ColumnNames = ColumnNames()
    """Names of the columns; each format's usual ones where left out"""
    languages: list[str] = []
    """Keep captions in these languages only; all where empty"""
    max_pairs: Annotated[int, Field(ge=2, le=MAX_COUNT)] | None = None
    """Most training pairs: where there are more, those whose groups have the lowest hashes are trained on, and the
    others are not read; validation keeps all of its own"""
    captions: Literal["sample", "all"] = "sample"
    """sample: one random caption of each pair per epoch; all: every caption is a separate sample"""
    augment: Augment | None = None
    """Augmentation of training images; the defaults of each field are the identity, so that ``{}`` is none"""
    feature_cache: Literal["auto", "off"] | StorageName = "auto"
    """Features of the frozen part of a tower are computed once and cached: auto, off, or the dtype on disk (float32,
    float16, bfloat16, int8)"""
    cached_augmentations: int = Field(default=0, ge=0, le=1000)
    """Augmented views of each image to cache for a frozen part, beside the plain one; 0: augment anew in each epoch"""
    class_weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Class pairs: where the image tower was trained as a classifier, its weight vectors and class names are pairs too,
    for ``head.init = "cca"``. A class counts as this many training pairs; 0: no class pairs; left out: 10 where the
    tower has a classifier"""
    class_ratio: float | None = Field(default=None, gt=0, le=100)
    """Class pairs added to each batch of gradient steps, per training pair, where both towers are frozen and cached;
    left out: class pairs count in the closed form only"""
    stage_gb: float = Field(default=50.0, gt=0, allow_inf_nan=False)
    """Gigabytes of disk, in the cache folder, for tar shards at addresses (``s3://…/{0000..0999}.tar``), which are
    fetched when they are read; the least recently used are deleted"""
    max_bad_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Fraction of unreadable samples above which the run stops"""

    @field_validator("format")
    @classmethod
    def _require_known_format(cls, name: str | None) -> str | None:
        if name is not None:
            from clasp.data.pairs import find_pair_format  # here, since it imports every format

            find_pair_format(name)
        return name

    @field_validator("augment")
    @classmethod
    def _drop_identity_augment(cls, augment: Augment | None) -> Augment | None:
        return None if augment == Augment() else augment
