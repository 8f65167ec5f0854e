"""The sharing policy: which parts of which layers two encoders share.

Input: the settings of ``[share]``. Output: a ``SharingPlan``, the sharing mode of each part of each layer, which prints
as a table. CLIP (nothing shared), MS-CLIP (attention and feed-forward), SharedCLIP (everything, with the final norm and
the head), separate first and last layers (Uni-X) and separate feed-forward parts (VLMo) are values of it. No weight is
touched here; ``models.sharing.tie`` applies the plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from clasp.errors import UserError

ATTENTION_PARTS = ("q", "k", "v", "o")  # the parts that ``attention`` sets
SHAREABLE_PARTS = (*ATTENTION_PARTS, "qk_norm", "ffn", "norm1", "norm2", "layer_scale")
_RANGE = re.compile(r"\s*(?:(-?\d+)|(-?\d+)?\s*:\s*(-?\d+)?)\s*")


@dataclass(frozen=True, slots=True)
class LowRankSharing:
    """Shared, with a low-rank update of this rank for each modality."""

    rank: int

    def __str__(self) -> str:
        return f"low-rank {self.rank}"


SharedOrSeparate = Literal["shared", "separate"]
SharingMode = SharedOrSeparate | LowRankSharing


def _check_matrix_sharing(value: Any) -> Any:
    if value in ("shared", "separate"):
        return value
    if value == "low-rank" or value in ({}, {"low-rank": None}):
        raise ValueError("'low-rank' needs a rank; write {low-rank = 8}")
    if not isinstance(value, dict) or list(value) != ["low-rank"]:
        raise ValueError(f"{value!r} is not one of 'shared', 'separate' and {{low-rank = 8}}")
    rank = value["low-rank"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"low-rank = {rank!r} is not a whole number from 1")
    return value


def _check_vector_sharing(value: Any) -> Any:
    if isinstance(value, dict) or value == "low-rank":
        raise ValueError("a vector has no rank; write 'shared' or 'separate'")
    return value


def _check_layer_range(value: Any) -> Any:
    if not isinstance(value, str) or not _RANGE.fullmatch(value) or not value.strip():
        raise ValueError(f"{value!r} is not a range of layers; write '1:', ':4', '4:8', '-6:' or '5'")
    return value


# as written in a recipe and in the resolved recipe
_MatrixSharing = Annotated[str | dict[str, int], BeforeValidator(_check_matrix_sharing)]
_VectorSharing = Annotated[SharedOrSeparate, BeforeValidator(_check_vector_sharing)]
_LayerRange = Annotated[str, BeforeValidator(_check_layer_range)]


class _PartSharingSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: _MatrixSharing = "separate"
    """Query, key, value and output projections of the attention: shared, separate, or {low-rank = r}: shared, with an
    update of rank r for each modality"""
    q: _MatrixSharing | None = None
    """The query projection; ``attention`` by default. Where q, k and v have the same low rank, the packed projection
    gets one update of that rank, with one down-projection for the three"""
    k: _MatrixSharing | None = None
    """The key projection; ``attention`` by default"""
    v: _MatrixSharing | None = None
    """The value projection; ``attention`` by default"""
    o: _MatrixSharing | None = None
    """The output projection; ``attention`` by default"""
    ffn: _MatrixSharing = "separate"
    """The feed-forward part: shared, separate, or {low-rank = r}"""
    qk_norm: _VectorSharing = "separate"
    """The query and key norms, where the blocks have them"""
    norm1: _VectorSharing = "separate"
    """The norm before the attention"""
    norm2: _VectorSharing = "separate"
    """The norm before the feed-forward part"""
    layer_scale: _VectorSharing = "separate"
    """The layer scale, where the blocks have one"""

    def part_modes(self) -> dict[str, SharingMode]:
        """The sharing mode of each of ``SHAREABLE_PARTS``."""
        projections = {
            part: self.attention if choice is None else choice for part, choice in self._projection_choices().items()
        }
        vectors = {"qk_norm": self.qk_norm, "norm1": self.norm1, "norm2": self.norm2, "layer_scale": self.layer_scale}
        choices = {**projections, "ffn": self.ffn, **vectors}
        return {part: _sharing_mode(choices[part]) for part in SHAREABLE_PARTS}

    def _projection_choices(self) -> dict[str, Any]:
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}


class SharingOverride(_PartSharingSettings):
    """A range of layers with sharing modes that differ from ``[share]``."""

    layers: _LayerRange
    """Range of layers: '1:', ':4', '4:8', '-6:' or '5'; counted from 0"""


class SharingSettings(_PartSharingSettings):
    """``[share]`` of a recipe: what the image encoder and the text encoder share. Nothing by default."""

    layers: _LayerRange | None = None
    """The layers that these settings apply to, counted from 0; by default all that ``overrides`` does not name. All
    other layers share nothing"""
    overrides: tuple[SharingOverride, ...] = ()
    """Further ranges of layers, with other sharing modes"""
    final_norm: _VectorSharing = "separate"
    """The norm after the last block"""
    head: _VectorSharing = "separate"
    """The projection head"""

    def resolve(self, layers: int) -> SharingPlan:
        """This policy for encoders of ``layers`` layers. Raises ``UserError`` for missing or overlapping layers."""
        rows: dict[int, dict[str, SharingMode]] = {}
        range_of: dict[int, str] = {}
        for section in (*self.overrides, self):
            if section.layers is None:
                numbers = [number for number in range(layers) if number not in rows]
            else:
                numbers = _layers_in_range(section.layers, layers)
            for number in numbers:
                if number in rows:
                    raise UserError(
                        f"share.layers = {section.layers!r} and {range_of[number]!r} both contain layer {number}; "
                        "ranges must not overlap"
                    )
                rows[number], range_of[number] = section.part_modes(), section.layers or "all others"
        nothing = SharingOverride(layers=":").part_modes()
        return SharingPlan(tuple(rows.get(number, nothing) for number in range(layers)), self.final_norm, self.head)


@dataclass(frozen=True)
class SharingPlan:
    """A policy resolved layer by layer. ``absent_parts`` are the parts that the blocks do not have; they are not
    printed."""

    layers: tuple[dict[str, SharingMode], ...]
    final_norm: SharedOrSeparate
    head: SharedOrSeparate
    absent_parts: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """A table of layers by parts; consecutive equal layers are one row."""
        columns = [part for part in SHAREABLE_PARTS if part not in self.absent_parts]
        if all(len({row[part] for part in ATTENTION_PARTS}) == 1 for row in self.layers):
            columns = ["attention", *(part for part in columns if part not in ATTENTION_PARTS)]
        table = [["layer", *columns]]
        for _, group in groupby(enumerate(self.layers), key=lambda numbered: numbered[1]):
            (first, row), *more = group
            numbers = f"{first}-{more[-1][0]}" if more else str(first)
            table.append([numbers, *(str(row["q" if column == "attention" else column]) for column in columns)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join([*lines, f"final norm: {self.final_norm}; head: {self.head}"])


def _sharing_mode(choice: Any) -> SharingMode:
    return LowRankSharing(choice["low-rank"]) if isinstance(choice, dict) else choice


def _layers_in_range(text: str, layers: int) -> range:
    """The layers of a range. Raises ``UserError`` unless all of them exist."""
    found = _RANGE.fullmatch(text)
    assert found is not None, "validated with the settings"
    single, start, stop = (None if end is None else int(end) for end in found.groups())
    if single is not None:
        start, stop = single, single + 1 or None
    first = 0 if start is None else start + layers * (start < 0)
    end = layers if stop is None else stop + layers * (stop < 0)
    if not 0 <= first < end <= layers:
        raise UserError(f"share.layers = {text!r}: there are layers 0 to {layers - 1}, and a range names one or more")
    return range(first, end)
