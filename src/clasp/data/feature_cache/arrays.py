"""Content-addressed arrays on disk: ``KEY.npy``, memory-mapped, with its metadata in ``KEY.json``.

Input: a key (everything that determines the values), and a function that writes the rows in any order. Output: the
rows, read from disk if they are there. KEY is a hash of the key. Note: a file has another name until it is complete,
and its progress is saved, so an interrupted build resumes; a second process that needs the same rows waits for the
first, unless both are of one group, which fills the file together. A truncated file is computed again, and so are the
rows of damaged blocks, with a warning. Free disk space is checked before computing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from clasp.data.atomic_files import sync_folder, with_checksum, write_text_file
from clasp.data.feature_cache.array_writer import ArrayWriter, allocate
from clasp.data.feature_cache.blocks import block_checksums, damaged_rows, is_as_written
from clasp.data.feature_cache.build_progress import BuildProgress, merge_notes, read_progress
from clasp.data.feature_cache.dtypes import DTYPE_CODECS, DtypeCodec, StorageDtype
from clasp.data.feature_cache.layers import find_layers
from clasp.data.feature_cache.partial_file import PartialFile, disk_error, lock_partial_file, open_partial_file
from clasp.data.process_group import SINGLE, ProcessGroup, raise_together
from clasp.plain_types import UserError

_FORMAT = 2  # increment it when the same key gives other values
_NOTES = ("skipped", "depth", "size")  # of the writer, in the metadata
_PROBE_ROWS = 64  # rows that are hashed to detect damaged files without reading all of them
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


def load_or_compute(
    folder: Path,
    key: Mapping[str, Any],
    shape: tuple[int, int],
    fill: Callable[[ArrayWriter], None],
    *,
    storage: StorageDtype = "float32",
    group: ProcessGroup = SINGLE,
    check: Callable[[Mapping[str, Any]], None] = lambda notes: None,
) -> CachedArray:
    """The rows of ``key`` (plain data); ``fill`` is called to write them if ``folder`` has no complete file of them.

    A file that has the layers of the key among others is read in its place, to the same bits. ``group``: the processes
    of this machine that all call it and fill the file together, each by its own ``fill``. ``check`` is called with the
    notes of all of them, and may raise ``UserError``.

    ``shape`` is (rows, values in a row). Raises ``UserError`` when ``folder`` is not writable or has too little space.
    """
    assert shape[0] * shape[1] > 0, f"nothing to store: {shape}"
    key = json.loads(json.dumps({**key, "shape": shape, "storage": storage}))  # as JSON reads it back: no tuples
    path = _cache_path(folder, key)
    with ExitStack() as stack:
        find = partial(_find_or_lock, stack, path, key, fill)
        found = raise_together(group, lambda: None if group.rank else find())
        if group.gather_objects(isinstance(found, PartialFile))[0]:
            part = found if isinstance(found, PartialFile) else stack.enter_context(open_partial_file(path))
            notes = _fill(part, key, fill, group)
            raise_together(group, lambda: None if group.rank else _finish(part, path, key, notes, check))
            return _read(path, key)
    return found if isinstance(found, CachedArray) else _find(path, key)


def _cache_path(folder: Path, key: Mapping[str, Any]) -> Path:
    """The file of the rows of a key."""
    return folder / f"{hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]}.npy"


def _find(path: Path, key: Mapping[str, Any]) -> CachedArray:
    """The rows in their own file or in a wider one. Raises ``_CacheMiss``."""
    with suppress(_CacheMiss):
        return _read(path, key)
    return _read_wider(path.parent, key)


def _find_or_lock(
    stack: ExitStack, path: Path, key: Mapping[str, Any], fill: Callable[[ArrayWriter], None]
) -> CachedArray | PartialFile:
    """The rows, repaired where blocks are damaged; else the partial file to write, locked until ``stack`` is closed."""
    with suppress(_CacheMiss):
        return _find(path, key)
    part = stack.enter_context(lock_partial_file(path, _num_bytes(key)))
    try:
        return _read(path, key)  # another process has just written it
    except _DamagedRows as damage:
        _repair(path, damage, fill)
        return _read(path, key)
    except _CacheMiss:
        return part


def _num_bytes(key: Mapping[str, Any]) -> int:
    return DTYPE_CODECS[key["storage"]].num_bytes(*key["shape"])


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
        storage, notes = DTYPE_CODECS[key["storage"]], {name: about[name] for name in _NOTES if name in about}
        writer = ArrayWriter(PartialFile(path, file), key, storage, BuildProgress(notes=notes), wanted=damage.rows)
        fill(writer)
        writer.sync()
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


def _fill(
    part: PartialFile, key: Mapping[str, Any], fill: Callable[[ArrayWriter], None], group: ProcessGroup
) -> dict[str, Any]:
    """Write the partial file, which is retained where ``fill`` is interrupted; returns the notes of all processes."""

    def begin() -> BuildProgress:
        with _partial_removed(part, key):
            return _allocate_or_resume(part, key)

    started = time.monotonic()
    resumed = raise_together(group, lambda: BuildProgress() if group.rank else begin())
    writer = ArrayWriter(part, key, DTYPE_CODECS[key["storage"]], group.gather_objects(resumed)[0], group=group)

    def write() -> None:
        with _partial_removed(part, key):
            fill(writer)
            writer.sync()

    raise_together(group, write)
    return {"seconds": round(time.monotonic() - started, 3), **merge_notes(group.gather_objects(writer.notes))}


def _allocate_or_resume(part: PartialFile, key: Mapping[str, Any]) -> BuildProgress:
    """Check that there is room; what an interrupted build of the partial file has done."""
    size = _num_bytes(key)
    allocated = os.fstat(part.file.fileno()).st_blocks * 512  # already allocated, when resuming
    if shutil.disk_usage(part.path.parent).free < size - allocated:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if not allocate(part, key, DTYPE_CODECS[key["storage"]]):
        return BuildProgress()
    progress = read_progress(part, key)
    if progress.done:
        _log.info("%s: resuming after %s", part.path, progress.count)
    return progress


def _finish(
    part: PartialFile,
    path: Path,
    key: Mapping[str, Any],
    notes: Mapping[str, Any],
    check: Callable[[Mapping[str, Any]], None],
) -> None:
    """Rename the whole partial file, then its ``.json``."""
    with _partial_removed(part, key):
        check(notes)
        about = {"key": key, "width": key["shape"][1], "storage": key["storage"], "bytes": _num_bytes(key), **notes}
        stored = np.lib.format.open_memmap(part.path, mode="r")
        about |= {"probe": _probe(stored), "blocks": block_checksums(stored)}
        write_text_file(part.progress(), json.dumps(with_checksum(about)) + "\n")
        os.replace(part.path, path)
        os.replace(part.progress(), path.with_suffix(".json"))
        sync_folder(path.parent)


@contextmanager
def _partial_removed(part: PartialFile, key: Mapping[str, Any]) -> Iterator[None]:
    """Removes the partial file after a ``UserError``, and where the disk is full, which becomes one."""
    try:
        yield
    except UserError:
        part.remove()
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        part.remove()
        raise disk_error(part.path.parent, _num_bytes(key), error) from error
