"""The contract between ``clasp.data.pairs`` and the formats: a source about to be opened, and one that is open.

A format is a function from a ``SourceSpec`` to an ``OpenedSource``. What it keeps in the cache folder is keyed by
everything that it depends on, ``SourceSpec.format`` included; the ``version`` of an image likewise, since feature
caches stand on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt64

from clasp.data.formats.rows import ColumnNames
from clasp.types import Pair


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One source about to be opened."""

    path: Path
    """As the user knows it."""
    file: Path
    """What is read: ``path``, or what was inside it when that is a ``.gz``."""
    columns: ColumnNames
    root: str
    """The folder image paths are relative to; absolute."""
    cache: Path | None
    format: str
    """The name of the format: a key of ``PAIR_FORMATS``, or ``package.module:Name``."""


@runtime_checkable
class OpenedSource(Protocol):
    """A source that has been opened: its pairs by row number, and the hashes of their ids."""

    @property
    def hashes(self) -> UInt64[np.ndarray, " pairs"]: ...

    @property
    def root(self) -> str:
        """The folder, or tar, in which image paths or keys are unique."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Pair: ...

    def prefixed(self, id_prefix: str, path_prefix: str) -> "OpenedSource":
        """The same, among other sources: what goes before ids, and before image paths that stand for a group."""
        ...


PairFormat = Callable[[SourceSpec], OpenedSource]
"""Opens a source and checks every caption; ``UserError`` in one line for whatever is wrong"""
