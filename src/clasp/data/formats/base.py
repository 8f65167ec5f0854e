"""The interface between ``clasp.data.pairs`` and the formats.

A format is a function from a ``SourceSpec`` (input) to an ``OpenedSource`` (output). Note: what it stores in the cache
folder must be keyed by everything that it depends on, ``SourceSpec.format`` included; the ``version`` of an image must
change with its bytes, since it is part of the key of feature caches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt64

from clasp.data.formats.rows import ColumnNames
from clasp.data.shard_stage import StagedShard
from clasp.plain_types import Pair


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A source to be opened."""

    path: Path
    """The path the user gave."""
    file: Path
    """The file to read: ``path``, or its unpacked copy if that is a ``.gz``."""
    columns: ColumnNames
    root: str
    """The folder that image paths are relative to; absolute."""
    cache: Path | None
    format: str
    """The name of the format: a key of ``PAIR_FORMATS``, or ``package.module:Name``."""
    leaves_root: bool = False
    """Whether image paths may lead out of ``root``: where the user named it."""
    address: str = ""
    """The address of a staged shard."""

    @property
    def name(self) -> str:
        """The name of the source in errors."""
        return self.address or str(self.path)


@runtime_checkable
class OpenedSource(Protocol):
    """An opened source: its pairs by row number, and the hashes of their ids."""

    @property
    def hashes(self) -> UInt64[np.ndarray, " pairs"]: ...

    @property
    def root(self) -> str:
        """The folder or tar within which image paths or keys are unique."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Pair: ...

    def prefixed(self, id_prefix: str, path_prefix: str) -> "OpenedSource":
        """A copy with a prefix for ids, and one for image paths used as group; for several sources together."""
        ...


@runtime_checkable
class KeyedSource(Protocol):
    """An opened source whose pairs are known by a key, so that what is derived from them can be stored."""

    @property
    def key(self) -> tuple[str, ...]:
        """All that its pairs depend on, but for the bytes of images; empty if that is unknown."""
        ...


@runtime_checkable
class ShardSource(Protocol):
    """An opened source whose images may be in a shard that is staged."""

    @property
    def shard(self) -> StagedShard | None:
        """The shard; ``None`` for a source on this disk."""
        ...


PairFormat = Callable[[SourceSpec], OpenedSource]
"""Opens a source and checks every caption; ``UserError`` in one line for any problem"""
