"""Content-addressed arrays on disk: ``KEY.npy``, memory-mapped, with its metadata in ``KEY.json``.

Input: a key (everything that determines the values), and a function that writes the rows in any order. Output: the
rows, read from disk if they are there. KEY is a hash of the key. Note: a file has another name until it is complete,
and its progress is saved, so an interrupted build resumes; a second process that needs the same rows waits for the
first. A truncated file is computed again, and so are the rows of damaged blocks, with a warning. Free disk space is
checked before computing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from clasp.data.atomic_files import sync_folder, with_checksum, write_text_file
from clasp.data.feature_cache.blocks import block_checksums, damaged_rows, is_as_written
from clasp.data.feature_cache.dtypes import DTYPE_CODECS, DtypeCodec
from clasp.data.feature_cache.layers import find_layers
from clasp.data.feature_cache.partial_file import PartialFile, disk_error, lock_partial_file
from clasp.plain_types import StorageDtype, UserError

_FORMAT = 2  # increment it when the same key gives other values
_NOTES = ("skipped", "depth", "size")  # of the writer, in the metadata
_PROBE_ROWS = 64  # rows that are hashed to detect damaged files without reading all of them
SECONDS_BETWEEN_SAVES = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CachedArray:
    """Rows on disk; ``metadata`` is the ``.json``: key, width, storage, bytes, seconds, and the writer's notes."""

    path: Path
    stored: Shaped[np.ndarray, "rows columns"]
    metadata: Mapping[str, Any]
    columns: Int[np.ndarray, " D"] | None = None
    """Those of the file that were asked for; ``None``: all"""

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def width(self) -> int:
        """``D``, the number of values in a row."""
        return self.metadata["width"] if self.columns is None else len(self.columns)

    def take(self, rows: Int[np.ndarray, "*shape"]) -> Float[Tensor, "*shape D"]:
        """A copy of these rows in memory, in the dtype of the file (int8 is dequantised to float32)."""
        stored = self.stored[rows]
        return self._storage.unpack(stored if self.columns is None else stored[..., self.columns])

    @cached_property
    def _storage(self) -> DtypeCodec:
        return DTYPE_CODECS[self.metadata["storage"]]

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process maps the file again; pickling the memory map would copy all of it
        return _open_mapped, (self.path, self.metadata, self.columns)


class ArrayWriter:
    """Writes the rows of a file. ``notes`` go into its ``.json``; rows not written are zero.

    ``done`` is the progress of an interrupted build in batches of the same size, as passed to ``save_progress``; 0 for
    a new file. ``wanted``: the rows to write of a complete file, which is repaired; the others are left as they are.
    """

    def __init__(
        self,
        part: PartialFile,
        shape: tuple[int, int],
        storage: DtypeCodec,
        key: Mapping[str, Any],
        *,
        wanted: Bool[np.ndarray, " rows"] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self._part, self._storage, self._key, self._wanted = part, storage, key, wanted
        self._batch_size = batch_size
        columns = shape[1] + storage.extra_columns
        self._row_bytes = columns * storage.dtype.itemsize
        header = {"descr": np.lib.format.dtype_to_descr(storage.dtype), "fortran_order": False}
        part.file.seek(0)
        before = os.fstat(part.file.fileno()).st_size
        np.lib.format.write_array_header_1_0(part.file, {**header, "shape": (shape[0], columns)})
        self._start = part.file.tell()
        whole = self._start + shape[0] * self._row_bytes
        if before != whole and wanted is None:
            part.remove_progress()  # of another file of this name; this one would soon have the size of that one
        self.done, self.notes = self._resume_state() if wanted is None else (0, {})
        part.file.truncate(whole)
        self._saved_at = time.monotonic()

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

    def save_progress(self, done: int) -> None:
        """Record the progress of the build; written to disk every ``SECONDS_BETWEEN_SAVES``, after the rows."""
        if self._wanted is None and time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES:
            self._part.file.flush()
            os.fsync(self._part.file.fileno())
            state = {"key": self._key, "batch_size": self._batch_size, "done": done, "notes": self.notes}
            write_text_file(self._part.progress, json.dumps(state))
            self._saved_at = time.monotonic()

    def _resume_state(self) -> tuple[int, dict[str, Any]]:
        with suppress(OSError, ValueError, KeyError):
            progress = json.loads(self._part.progress.read_text(encoding="utf-8"))
            if progress["key"] == self._key and progress["batch_size"] == self._batch_size:
                _log.info("%s: resuming after %s", self._part.path, progress["done"])
                return progress["done"], progress["notes"]
        return 0, {}


def load_or_compute(
    folder: Path,
    key: Mapping[str, Any],
    shape: tuple[int, int],
    fill: Callable[[ArrayWriter], None],
    *,
    storage: StorageDtype = "float32",
    batch_size: int | None = None,
) -> CachedArray:
    """The rows of ``key`` (plain data); ``fill`` is called to write them if ``folder`` has no complete file of them.

    A file that has the layers of the key among others is read in its place, to the same bits. ``batch_size``: that of
    ``fill``, where the order in which it writes depends on it; a build is resumed in batches of the same size only.

    ``shape`` is (rows, values in a row). Raises ``UserError`` when ``folder`` is not writable or has too little space.
    """
    assert shape[0] * shape[1] > 0, f"nothing to store: {shape}"
    key = json.loads(json.dumps({**key, "shape": shape, "storage": storage}))  # as JSON reads it back: no tuples
    path = cache_path(folder, key)
    for read in (lambda: _read(path, key), lambda: _read_wider(folder, key)):
        with suppress(_CacheMiss):
            return read()
    with lock_partial_file(path, DTYPE_CODECS[storage].num_bytes(*shape)) as part:
        try:
            return _read(path, key)  # another process has just written it
        except _DamagedRows as damage:
            _repair(path, damage, fill)
        except _CacheMiss:
            _compute_and_write(part, path, key, fill, batch_size)
    return _read(path, key)


def cache_path(folder: Path, key: Mapping[str, Any]) -> Path:
    """The file of the rows of a key, which has their shape and storage."""
    return folder / f"{hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]}.npy"


class _CacheMiss(Exception):
    """There is no complete, valid file."""


class _DamagedRows(_CacheMiss):
    """A complete file with damaged blocks: its metadata, and which rows lie in them."""

    def __init__(self, metadata: Mapping[str, Any], rows: Bool[np.ndarray, " rows"]) -> None:
        super().__init__()
        self.metadata, self.rows = metadata, rows


_checked: set[tuple[Any, ...]] = set()  # files that this process has read from front to back


def _read(path: Path, key: Mapping[str, Any]) -> CachedArray:
    if not path.exists():
        raise _CacheMiss
    try:
        cached = _open_mapped(path, json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        rows, width = key["shape"]
        storage = DTYPE_CODECS[key["storage"]]
        same = cached.metadata["key"] == key and cached.stored.shape == (rows, width + storage.extra_columns)
        if not (same and cached.stored.dtype == storage.dtype and is_as_written(cached.metadata)):
            raise ValueError("key, shape or hash differs")
        damaged = _damaged_rows(path, cached)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _log.warning("%s: truncated or damaged (%s); computing it again", path, error)
        raise _CacheMiss from error
    if damaged.any():
        raise _DamagedRows(cached.metadata, damaged)
    return cached


def _damaged_rows(path: Path, cached: CachedArray) -> Bool[np.ndarray, " rows"]:
    """The rows in damaged blocks; a file of an earlier version has the hash of a few rows only."""
    status = path.stat()
    version = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
    if version in _checked:
        return np.zeros(len(cached), dtype=bool)
    if "blocks" not in cached.metadata:
        if cached.metadata["probe"] != _probe(cached.stored):
            raise ValueError("hash differs")
        return np.zeros(len(cached), dtype=bool)
    damaged = damaged_rows(cached.stored, cached.metadata["blocks"])
    if not damaged.any():
        _checked.add(version)
    return damaged


def _repair(path: Path, damage: _DamagedRows, fill: Callable[[ArrayWriter], None]) -> None:
    """Compute the damaged rows of a file again, in place; a kill in between leaves them damaged, and known as such."""
    about, key = dict(damage.metadata), damage.metadata["key"]
    _log.warning("%s: %d of %d rows are damaged; computing them again", path, damage.rows.sum(), len(damage.rows))
    with path.open("r+b") as file:
        part = PartialFile(path, file)
        writer = ArrayWriter(part, tuple(key["shape"]), DTYPE_CODECS[key["storage"]], key, wanted=damage.rows)
        writer.notes = {name: about[name] for name in _NOTES if name in about}
        fill(writer)
        file.flush()
        os.fsync(file.fileno())
    about |= {**writer.notes, "blocks": block_checksums(np.lib.format.open_memmap(path, mode="r"))}
    write_text_file(path.with_suffix(".json"), json.dumps(with_checksum(about)) + "\n")


def _read_wider(folder: Path, key: Mapping[str, Any]) -> CachedArray:
    """The columns of these layers in a file of more."""
    found = find_layers(folder, {name: value for name, value in key.items() if name != "shape"})
    if found is None or found.columns is None or len(found.columns) != key["shape"][1]:
        raise _CacheMiss
    with suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or just being replaced
        whole = json.loads(found.file.with_suffix(".json").read_text(encoding="utf-8"))["key"]
        return replace(_read(found.file, whole), columns=found.columns)
    raise _CacheMiss


def _open_mapped(path: Path, about: Mapping[str, Any], columns: Int[np.ndarray, " D"] | None = None) -> CachedArray:
    return CachedArray(path, np.lib.format.open_memmap(path, mode="r"), about, columns)


def _probe(stored: np.ndarray) -> str:
    """A hash of ``_PROBE_ROWS`` evenly spaced rows."""
    rows = np.linspace(0, len(stored) - 1, _PROBE_ROWS).astype(np.int64)
    return hashlib.sha256(np.ascontiguousarray(stored[rows]).tobytes()).hexdigest()


def _compute_and_write(
    part: PartialFile,
    path: Path,
    key: Mapping[str, Any],
    fill: Callable[[ArrayWriter], None],
    batch_size: int | None,
) -> None:
    """Fill the partial file, then rename it, then its ``.json``. If ``fill`` is interrupted, the part is retained."""
    storage, shape = DTYPE_CODECS[key["storage"]], tuple(key["shape"])
    size = storage.num_bytes(*shape)
    started = time.monotonic()
    try:
        allocated = os.fstat(part.file.fileno()).st_blocks * 512  # already allocated, when resuming
        if shutil.disk_usage(path.parent).free < size - allocated:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        writer = ArrayWriter(part, shape, storage, key, batch_size=batch_size)
        fill(writer)
        part.file.flush()
        os.fsync(part.file.fileno())
        about = {"key": key, "width": shape[1], "storage": key["storage"], "bytes": size}
        about |= {"seconds": round(time.monotonic() - started, 3), **writer.notes}
        stored = np.lib.format.open_memmap(part.path, mode="r")
        about |= {"probe": _probe(stored), "blocks": block_checksums(stored)}
        write_text_file(part.progress, json.dumps(with_checksum(about)) + "\n")
        os.replace(part.path, path)
        os.replace(part.progress, path.with_suffix(".json"))
        sync_folder(path.parent)
    except UserError:
        part.remove()
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        part.remove()
        raise disk_error(path.parent, size, error) from error
