"""Pairs: a sequence over one or several opened sources, its subsets, and the split for validation.

Input: parts (opened sources, or lists of ``Pair``). Output: ``Pairs``. Note: a subset is an array of row numbers of the
same parts, and shares their columns (``PairColumns``), which are read or mapped when they are first needed: a split, a
selection by language and the index of a run read no pair of a source whose columns are stored.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, overload, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int

from clasp.data.distinct_images import ImageNumbers, number_images
from clasp.data.formats.base import KeyedSource, ShardSource
from clasp.data.formats.index_cache import load_or_build_index
from clasp.data.formats.skipped_files import SkippedFiles, SkippedKind
from clasp.data.pair_columns import MIN_STORED_PAIRS, PairColumns
from clasp.data.shard_stage import StagedShard
from clasp.data.text_column import TextColumn
from clasp.plain_types import Pair, UserError


@runtime_checkable
class _PairSequence(Protocol):
    """What ``Pairs`` needs of a part; a list of ``Pair`` qualifies."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Pair: ...


class _JoinedParts(Sequence[Pair]):
    """The parts of ``Pairs`` as one sequence, with its columns."""

    def __init__(self, parts: Sequence[_PairSequence], cache: Path | None) -> None:
        self.parts, self.cache = tuple(parts), cache
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __iter__(self) -> Iterator[Pair]:
        # the default of Sequence would take an IndexError inside a part for the end
        return (part[row] for part in self.parts for row in range(len(part)))

    def __getitem__(self, row: Any) -> Any:
        part = self.part_of(row)
        return self.parts[part][row - (int(self.ends[part - 1]) if part else 0)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "columns"}  # a worker maps its own

    def part_of(self, row: int) -> int:
        return int(np.searchsorted(self.ends, row, side="right"))

    @cached_property
    def key(self) -> tuple[str, ...]:
        """All that the pairs depend on; empty where nothing derived from them is stored."""
        keys = [part.key if isinstance(part, KeyedSource) else () for part in self.parts]
        if self.cache is None or len(self) < MIN_STORED_PAIRS or not all(keys):
            return ()
        return tuple(value for key in keys for value in (str(len(key)), *key))

    @cached_property
    def columns(self) -> PairColumns:
        return PairColumns.of(self, self.cache, self.key)


class Pairs(Sequence[Pair]):
    """The concatenated pairs of one or several parts.

    ``name`` is the source as the user gave it. A part is an opened file or a list of ``Pair``. With a ``cache`` folder,
    what is derived from many pairs is stored there.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[_PairSequence],
        *,
        skipped_files: SkippedFiles | None = None,
        origins: Sequence[str] = (),
        cache: Path | None = None,
    ):
        assert len(origins) in (0, len(parts)), f"{len(origins)} origins of {len(parts)} parts"
        self.name = name
        self.skipped_files = skipped_files or SkippedFiles()
        """Files skipped when the source was opened."""
        self.origins = tuple(origins)
        """The path of each part, if these are all pairs of a source; empty for a subset."""
        self._joined = _JoinedParts(parts, cache)
        assert len(self._joined) < 1 << 31, "row numbers are 32 bits wide"
        self.rows: Int[np.ndarray, " pairs"] = np.arange(len(self._joined), dtype=np.int32)
        """The rows of ``columns`` that these pairs are."""

    def __repr__(self) -> str:
        return f"Pairs({self.name!r}, {len(self)} pairs)"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Pair]:
        # the default of Sequence would take an IndexError inside a part for the end
        return (self[number] for number in range(len(self)))

    @overload
    def __getitem__(self, index: SupportsIndex) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Pair | Pairs:
        if isinstance(index, slice):
            return self._at(self.rows[index])
        return self._joined[int(self.rows[operator.index(index)])]

    def __getstate__(self) -> dict[str, Any]:
        # a worker reads pairs by their numbers only
        return {name: value for name, value in self.__dict__.items() if name not in ("images", "_image_numbers")}

    def _at(self, rows: Int[np.ndarray, " pairs"]) -> Pairs:
        """These rows of the same parts."""
        made = Pairs.__new__(Pairs)
        made.name, made.skipped_files, made.origins = self.name, self.skipped_files, ()
        made._joined, made.rows = self._joined, rows
        return made

    @property
    def columns(self) -> PairColumns:
        """The columns of all pairs of the parts, of which these are ``rows``."""
        return self._joined.columns

    @property
    def shard_of_part(self) -> tuple[StagedShard | None, ...]:
        """The staged shard of each part; ``None`` for one on this disk."""
        return tuple(part.shard if isinstance(part, ShardSource) else None for part in self._joined.parts)

    @property
    def shards(self) -> tuple[StagedShard, ...]:
        """The staged shard of each part; empty where a part is on this disk."""
        found = self.shard_of_part
        shards = tuple(shard for shard in found if shard is not None)
        return shards if len(shards) == len(found) else ()

    def parts_of(self, numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The number of the part that each of these pairs comes from."""
        return np.searchsorted(self._joined.ends, self.rows[numbers], side="right")

    @property
    def ids(self) -> TextColumn:
        """The ids."""
        return self.columns.ids.select(self.rows)

    @property
    def caption_counts(self) -> Int[np.ndarray, " pairs"]:
        """The number of captions of each pair."""
        ends = self.columns.caption_offsets
        return ends[self.rows + 1] - ends[self.rows]

    @property
    def group_count(self) -> int:
        """The number of groups: the rows of one image are one query, however many captions it has."""
        return len(np.unique(self.columns.group[self.rows]))

    def origin(self, index: int) -> str:
        """The path of the part that a pair comes from; needs ``origins``."""
        return self.origins[self._joined.part_of(int(self.rows[index]))]

    def subset(self, indices: Iterable[SupportsIndex]) -> Pairs:
        """The pairs at these indices, in this order."""
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter((operator.index(index) for index in indices), np.int64)
        return self._at(self.rows[indices])

    # --- images --------------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        """sha256 over ids and image versions, in order: a cache key for what is computed from the images.

        Reads no image, but the size and modification time of every image file.
        """
        return self._image_numbers.version

    @cached_property
    def images(self) -> DistinctImages:
        """Each image once, of rows that name the same (``clasp.data.distinct_images``); reads what ``version`` does."""
        numbers = self._image_numbers
        return DistinctImages(self if len(numbers.first) == len(self) else self.subset(numbers.first), numbers.entry)

    @cached_property
    def _image_numbers(self) -> ImageNumbers:
        return number_images(self)

    # --- languages -----------------------------------------------------------------------------------------------

    def count_languages(self) -> Counter[str]:
        """The number of captions in each language; those without a tag are counted as ``""``."""
        columns = self.columns
        uses = np.bincount(self.rows, minlength=len(columns.group))  # a subset may have a pair more than once
        often = np.repeat(uses, np.diff(columns.caption_offsets))
        counts = np.bincount(columns.language, often, len(columns.languages))
        return Counter({name: int(count) for name, count in zip(columns.languages, counts, strict=True) if count})

    def in_languages(self, languages: Sequence[str]) -> Pairs:
        """The pairs that have captions in these languages, with those captions only; may be empty."""
        columns = self.columns
        wanted = np.isin(columns.language, np.flatnonzero([name in languages for name in columns.languages]))
        ends = np.concatenate(([0], np.cumsum(wanted)))[columns.caption_offsets]
        kept = np.diff(ends)[self.rows] > 0
        parts = [_InLanguages(part, tuple(languages)) for part in self._joined.parts]
        made = Pairs(self.name, parts, skipped_files=self.skipped_files, cache=self._joined.cache)
        dropped = np.flatnonzero(~kept)
        if len(dropped):
            reason = f"pair without a caption in {', '.join(languages)}"
            made.skipped_files += SkippedFiles((SkippedKind(reason, len(dropped), self.ids[int(dropped[0])]),))
        made.rows = self.rows[kept]
        return made

    # --- groups --------------------------------------------------------------------------------------------------

    def group_fractions(self, salt: str) -> Float64[np.ndarray, " pairs"]:
        """A hash of the group of each pair, in [0, 1)."""
        joined, columns = self._joined, self.columns

        def build() -> dict[str, np.ndarray]:
            hashes = (_hash_fraction(group, salt) for group in columns.groups)
            return {"fraction": np.fromiter(hashes, np.float64, len(columns.groups))}

        key = ("group fractions", salt, *joined.key)
        fractions = load_or_build_index(joined.cache, key, build) if joined.key else build()
        return fractions["fraction"][columns.group[self.rows]]


@dataclass(frozen=True, eq=False)
class DistinctImages:
    """The images of some pairs, each once."""

    pairs: Pairs
    """The first pair of each image."""
    entry: Int[np.ndarray, " pairs"]
    """The number of the image of each of all pairs, among those."""

    def pairs_with(self, image: int) -> list[int]:
        """All pairs of an image."""
        order, ends = self._by_image
        return order[ends[image] : ends[image + 1]].tolist()

    @cached_property
    def _by_image(self) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " bounds"]]:
        return np.argsort(self.entry, kind="stable"), np.concatenate(([0], np.cumsum(np.bincount(self.entry))))


@dataclass(frozen=True, eq=False)
class _InLanguages:
    """The pairs of a part, with their captions in some languages only."""

    part: _PairSequence
    languages: tuple[str, ...]

    @property
    def key(self) -> tuple[str, ...]:
        key = self.part.key if isinstance(self.part, KeyedSource) else ()
        return ("in languages", *self.languages, *key) if key else ()

    @property
    def shard(self) -> StagedShard | None:
        return self.part.shard if isinstance(self.part, ShardSource) else None

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, row: int, /) -> Pair:
        pair = self.part[row]
        return replace(pair, captions=tuple(caption for caption in pair.captions if caption.language in self.languages))


def split_by_group(pairs: Pairs, fraction: float, *, salt: str = "clasp") -> tuple[Pairs, Pairs]:
    """Split into training and validation pairs: about ``fraction`` of the groups are held out, by a hash of the group.

    A group is never on both sides, and does not change sides when pairs are added or removed. Neither side is empty.
    ``UserError`` for a ``fraction`` outside (0, 1), and when there is only one group.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the fraction for validation must lie between 0 and 1, not {fraction}")
    groups = pairs.group_fractions(salt)
    held_out = groups < fraction
    if groups.min() == groups.max():
        all_of = "its only pair is" if len(pairs) == 1 else f"all {len(pairs):,} pairs are"
        raise UserError(f"{pairs.name}: {all_of} one group, so none can be split off for validation")
    if not held_out.any():
        held_out = groups == groups.min()
    if held_out.all():
        held_out = groups < groups.max()
    return pairs.subset(np.flatnonzero(~held_out)), pairs.subset(np.flatnonzero(held_out))


def _hash_fraction(group: str, salt: str) -> float:
    """A hash of a text, in [0, 1)."""
    digest = hashlib.sha256(f"{salt}\0{group}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def caption_languages(pairs: Pairs) -> list[str]:
    """The distinct languages of the captions, sorted; untagged captions are ignored."""
    return sorted(pairs.count_languages().keys() - {""})
