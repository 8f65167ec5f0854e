"""Writes the rows of a cache file, in any order, by one process or by several of a node.

Input: the partial file, the progress of an interrupted build, and the processes that fill it. Output: rows in the file,
and the progress beside it every ``SECONDS_BETWEEN_SAVES``. Note: each process writes its share of the batches; they are
divided anew by every build, so any number of processes goes on where others were killed.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clasp.data.feature_cache.build_progress import BuildProgress
from clasp.data.feature_cache.dtypes import DtypeCodec
from clasp.data.feature_cache.partial_file import PartialFile
from clasp.data.process_group import SINGLE, ProcessGroup, own_share

SECONDS_BETWEEN_SAVES = 5.0


class ArrayWriter:
    """Writes the rows of a file that is ``allocated``. ``notes`` go into its ``.json``; rows not written are zero.

    ``progress`` is that of an interrupted build. ``wanted``: the rows to write of a complete file, which is repaired;
    the others are left as they are.
    """

    def __init__(
        self,
        part: PartialFile,
        key: Mapping[str, Any],
        storage: DtypeCodec,
        progress: BuildProgress,
        *,
        wanted: Bool[np.ndarray, " rows"] | None = None,
        group: ProcessGroup = SINGLE,
    ) -> None:
        self._part, self._storage, self._key, self._wanted = part, storage, key, wanted
        self._progress, self._group = progress, group
        self._row_bytes = storage.num_bytes(1, key["shape"][1])
        self._start = len(_header(key, storage))
        self._saved_at = time.monotonic()

    @property
    def notes(self) -> dict[str, Any]:
        """What goes into the ``.json``; of a resumed build, what it had."""
        return self._progress.notes

    @notes.setter
    def notes(self, notes: dict[str, Any]) -> None:
        self._progress.notes = notes

    @property
    def done(self) -> int:
        """Samples that are done: by an interrupted build, and by this process."""
        return self._progress.count

    def share(self, ends: Sequence[int]) -> list[int]:
        """The batches that this process computes: its share of those that are not done. Batch i has the samples before
        ``ends[i]`` that no earlier one has."""
        return list(
            own_share(np.flatnonzero(~self._progress.covers(np.array(ends, dtype=np.int64))).tolist(), self._group)
        )

    def needs(self, rows: Int[np.ndarray, " n"]) -> bool:
        """Whether any of these rows is to be written."""
        return self._wanted is None or bool(self._wanted[rows].any())

    def write(self, rows: Int[np.ndarray, " n"], values: Float[Tensor, "n D"]) -> None:
        """Write ``values`` at ``rows``, those that are needed.

        Plain writes, since a full disk would be a bus error in a memory map.
        """
        if self._wanted is not None:
            kept = self._wanted[rows]
            rows, values = rows[kept], values[torch.from_numpy(kept)]
        packed = np.ascontiguousarray(self._storage.pack(values), dtype=self._storage.dtype)
        # consecutive rows are written together
        ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        start = 0
        for end in ends:
            self._part.file.seek(self._start + self._row_bytes * int(rows[start]))
            self._part.file.write(packed[start:end].data)
            start = end

    def add_done(self, first: int, end: int) -> None:
        """Record that samples ``first`` to ``end`` are done; saved from time to time, after the rows."""
        self._progress.add(first, end)
        if self._wanted is None and time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES:
            self.sync()
            self._progress.save(self._part, self._group.rank, self._key)
            self._saved_at = time.monotonic()

    def sync(self) -> None:
        """The rows are on disk when this returns."""
        self._part.file.flush()
        os.fsync(self._part.file.fileno())


def allocate(part: PartialFile, key: Mapping[str, Any], storage: DtypeCodec) -> bool:
    """Give the partial file its header and its size; whether it had that size already."""
    header, (rows, width) = _header(key, storage), key["shape"]
    size = len(header) + storage.num_bytes(rows, width)
    before = os.fstat(part.file.fileno()).st_size
    part.file.seek(0)
    part.file.write(header)
    part.file.truncate(size)
    part.file.flush()
    return before == size


def _header(key: Mapping[str, Any], storage: DtypeCodec) -> bytes:
    """The header of a ``.npy`` of the rows of a key."""
    rows, width = key["shape"]
    facts = {"descr": np.lib.format.dtype_to_descr(storage.dtype), "fortran_order": False}
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {**facts, "shape": (rows, width + storage.extra_columns)})
    return made.getvalue()
