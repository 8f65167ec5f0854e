"""The sharing policy: which parts of which layers two nets hold in common.

In go the settings of ``[share]``, out comes a ``SharingPlan``: for each layer and part how it is kept, which prints
itself as a table. One definition has CLIP (nothing shared), MS-CLIP (attention and feed-forward), SharedCLIP (all of
it, the final norm and the head), separate ends (Uni-X) and separate feed-forward parts (VLMo) as its values. Nothing
here touches a weight; ``nn.shared`` does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from clasp.types import UserError

ATTENTION_PARTS = ("q", "k", "v", "o")  # the parts that ``attention`` speaks of
SHAREABLE_PARTS = (*ATTENTION_PARTS, "qk_norm", "ffn", "norm1", "norm2", "layer_scale")
_RANGE = re.compile(r"\s*(?:(-?\d+)|(-?\d+)?\s*:\s*(-?\d+)?)\s*")


@dataclass(frozen=True, slots=True)
class LowRankSharing:
    """Shared, and a difference of this rank for each modality."""

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
        raise ValueError(f"{value!r} is none of 'shared', 'separate' and {{low-rank = 8}}")
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


# what a recipe says, and what it reads back as
_MatrixSharing = Annotated[str | dict[str, int], BeforeValidator(_check_matrix_sharing)]
_VectorSharing = Annotated[SharedOrSeparate, BeforeValidator(_check_vector_sharing)]
_LayerRange = Annotated[str, BeforeValidator(_check_layer_range)]


class _PartSharingSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: _MatrixSharing = "separate"
    """Queries, keys, values and output of the attention: shared, separate, or {low-rank = r}: shared, with a difference
    of rank r for each modality"""
    q: _MatrixSharing | None = None
    """The queries alone; as ``attention`` where left out. Where q, k and v have low rank alike, one difference of that
    rank serves the three: the matrices into it are one"""
    k: _MatrixSharing | None = None
    """The keys alone"""
    v: _MatrixSharing | None = None
    """The values alone"""
    o: _MatrixSharing | None = None
    """The output projection alone"""
    ffn: _MatrixSharing = "separate"
    """The feed-forward part: shared, separate, or {low-rank = r}"""
    qk_norm: _VectorSharing = "separate"
    """The norms of queries and keys, where the blocks have them"""
    norm1: _VectorSharing = "separate"
    """The norm before the attention"""
    norm2: _VectorSharing = "separate"
    """The norm before the feed-forward part"""
    layer_scale: _VectorSharing = "separate"
    """The layer scale, where the blocks have one"""

    def part_modes(self) -> dict[str, SharingMode]:
        """How each of ``SHAREABLE_PARTS`` is kept."""
        whole = {
            part: self.attention if choice is None else choice for part, choice in self._projection_choices().items()
        }
        vectors = {"qk_norm": self.qk_norm, "norm1": self.norm1, "norm2": self.norm2, "layer_scale": self.layer_scale}
        said = {**whole, "ffn": self.ffn, **vectors}
        return {part: _sharing_mode(said[part]) for part in SHAREABLE_PARTS}

    def _projection_choices(self) -> dict[str, Any]:
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}


class SharingOverride(_PartSharingSettings):
    """Some layers of ``[share]``, and how their parts are kept."""

    layers: _LayerRange
    """Which: '1:', ':4', '4:8', '-6:' or '5'; counted from 0"""


class SharingSettings(_PartSharingSettings):
    """``[share]`` of a recipe: what the image net and the text net hold in common. Nothing, where nothing is said."""

    layers: _LayerRange | None = None
    """The layers that this speaks of, counted from 0; where left out, all that ``also`` does not name. In all others
    nothing is shared"""
    overrides: tuple[SharingOverride, ...] = ()
    """Further layers with parts kept in other ways"""
    final_norm: _VectorSharing = "separate"
    """The norm after the last block"""
    head: _VectorSharing = "separate"
    """The projection to the joint space"""

    def resolve(self, layers: int) -> SharingPlan:
        """This policy for nets of so many layers. Raises ``UserError`` for layers that do not exist or come twice."""
        rows: dict[int, dict[str, SharingMode]] = {}
        said_by: dict[int, str] = {}
        for stretch in (*self.overrides, self):
            if stretch.layers is None:
                numbers = [number for number in range(layers) if number not in rows]
            else:
                numbers = _layers_in_range(stretch.layers, layers)
            for number in numbers:
                if number in rows:
                    raise UserError(
                        f"share.layers = {stretch.layers!r} and {said_by[number]!r} both speak of layer {number}; each "
                        "layer is in one range"
                    )
                rows[number], said_by[number] = stretch.part_modes(), stretch.layers or "all others"
        nothing = SharingOverride(layers=":").part_modes()
        return SharingPlan(tuple(rows.get(number, nothing) for number in range(layers)), self.final_norm, self.head)


@dataclass(frozen=True)
class SharingPlan:
    """A policy layer by layer. ``absent_parts`` names the parts that the blocks do not have, which are then not
    printed."""

    layers: tuple[dict[str, SharingMode], ...]
    final_norm: SharedOrSeparate
    head: SharedOrSeparate
    absent_parts: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """A table: layers by parts, like layers in one row."""
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
    """The layers that a range names; every one of them exists."""
    found = _RANGE.fullmatch(text)
    assert found is not None, "checked when the settings were read"
    single, start, stop = (None if end is None else int(end) for end in found.groups())
    if single is not None:
        start, stop = single, single + 1 or None
    first = 0 if start is None else start + layers * (start < 0)
    end = layers if stop is None else stop + layers * (stop < 0)
    if not 0 <= first < end <= layers:
        raise UserError(f"share.layers = {text!r}: there are layers 0 to {layers - 1}, and a range names one or more")
    return range(first, end)
