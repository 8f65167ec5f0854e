"""On-disk cache of what is derived from a source file: its index, and the unpacked form of a ``.gz``.

Input: a file, and a cache folder or none. Output: arrays, or the path of the unpacked file. Note: an index is saved
only if there is a cache folder, as Arrow buffers that are mapped into memory: an index of any size takes none of the
process, nor of its workers, and is read through once in each to compare checksums. A ``.gz`` must be unpacked for
random access, so without a cache folder it goes to a temporary folder that is removed when the process ends. Entries
are keyed by path, size and modification time of the file, and written atomically. A damaged index is made again, with
a warning.
"""

import atexit
import functools
import gzip
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from io import BufferedIOBase
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa

from clasp.data.atomic_files import is_disk_full, replace_file, translate_disk_errors
from clasp.plain_types import UserError

_INDEX_VERSION = "5"  # of the arrays; incrementing it invalidates all saved indices

# a .gz that unpacks to more than both is refused: captions take a tenth to a thirtieth packed, zeros a thousandth
_MAX_UNPACKED_RATIO, _MAX_SMALL_UNPACKED_BYTES = 100, 256 << 20

_log = logging.getLogger(__name__)

IndexArrays = dict[str, np.ndarray]


def file_stamp(path: str | Path | int) -> str:
    """Size (bytes) and modification time (ns) of a file; changes when its bytes may have changed."""
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


_only_cached: ContextVar[bool] = ContextVar("only_cached", default=False)


class NotIndexed(Exception):
    """An index would have to be built."""


@contextmanager
def only_cached_indexes() -> Iterator[None]:
    """Within it, ``NotIndexed`` is raised where an index that is kept in a cache folder is not there."""
    token = _only_cached.set(True)
    try:
        yield
    finally:
        _only_cached.reset(token)


def load_or_build_index(cache: Path | None, key: tuple[str, ...], build: Callable[[], IndexArrays]) -> IndexArrays:
    """The arrays of ``build()``, mapped from the cache folder, where they are saved under ``key``.

    ``key``: the format, the resolved path of the source, and everything else that the arrays depend on. Raises
    ``UserError`` where the folder has no room or cannot be written to, ``NotIndexed`` within ``only_cached_indexes``.
    """
    assert len(key) > 1, "a key without its source would give one source's arrays to another"
    if cache is None:
        return build()
    file = cache / f"index-{_digest(_INDEX_VERSION, *key)}.arrow"
    if file.exists():
        try:
            return _map_arrays(file)
        except Exception as error:  # damaged bytes raise errors of Arrow, JSON, keys and types
            _log.warning("%s: damaged (%s); indexing the pairs again", file, " ".join(str(error).split()))
    if _only_cached.get():
        raise NotIndexed(str(file))
    arrays = build()
    with translate_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as part:
            _write_arrays(part, arrays)
    return _map_arrays(file)


def _write_arrays(file: Path, arrays: IndexArrays) -> None:
    """One record batch of one row: the bytes of each array, with shape, type and checksum as metadata."""
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    columns = [pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, _cell(array)) for array in plain.values()]
    about = json.dumps(
        {name: [array.dtype.str, array.shape, zlib.crc32(array.data.cast("B"))] for name, array in plain.items()}
    ).encode()
    batch = pa.record_batch(columns, names=list(plain))
    schema = batch.schema.with_metadata({"arrays": about, "checksum": str(zlib.crc32(about))})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))


def _cell(array: np.ndarray) -> list[pa.Buffer | None]:
    return [None, pa.py_buffer(np.array([0, array.nbytes], np.int64)), pa.py_buffer(array)]


def _map_arrays(file: Path) -> IndexArrays:
    """The arrays of ``_write_arrays``; ``ValueError`` if a byte of them has changed."""
    with pa.memory_map(str(file)) as mapped:  # what refers to the map keeps it, and no file descriptor
        batch = pa.ipc.open_file(mapped).get_batch(0)
    about = batch.schema.metadata[b"arrays"]
    if str(zlib.crc32(about)).encode() != batch.schema.metadata[b"checksum"]:
        raise ValueError("its description has another checksum")
    arrays = {}
    for name, (kind, shape, checksum) in json.loads(about).items():
        data = batch.column(name).buffers()[2]
        if zlib.crc32(data) != checksum:
            raise ValueError(f"its array {name} has another checksum")
        arrays[name] = np.frombuffer(data, kind).reshape(shape).view(_MappedArray)
        arrays[name].place = (file.absolute(), name)  # a worker may start in another folder
    return arrays


_MIN_MAPPED_BYTES = 1 << 16  # smaller arrays are pickled by value


class _MappedArray(np.ndarray):
    """An array of an index file, pickled as its ``place`` there, so that a worker maps the file too; a part of it, or
    what is computed from it, is pickled by value."""

    place: tuple[Path, str] | None

    def __array_finalize__(self, made_from: np.ndarray | None) -> None:
        self.place = None

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if self.place is None or self.nbytes < _MIN_MAPPED_BYTES:
            return np.asarray(self).__reduce_ex__(protocol)
        return _map_again, self.place


def _map_again(file: Path, name: str) -> np.ndarray:
    try:
        return _mapped_in_worker(file)[name]
    except Exception as error:  # as in ``load_or_build_index``
        reason = " ".join(str(error).split())
        raise UserError(f"{file} was deleted or damaged while it was in use ({reason}); start again") from None


_mapped_in_worker = functools.cache(_map_arrays)


def unpack_gzip(path: Path, cache: Path | None) -> Path:
    """The unpacked file of ``path`` (a ``.gz``), cached; it has the modification time of ``path``, as with gunzip.

    Raises ``UserError`` for one that is damaged, or unpacks to more than pairs ever do.
    """
    status = path.stat()

    def unpack(part: Path) -> None:
        with gzip.open(path, "rb") as packed, part.open("wb") as plain:
            shutil.copyfileobj(_BoundedReader(path, status.st_size, packed), plain, 1 << 20)
        os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))

    try:
        return derived_file(path, "unpacked", cache, unpack)
    except EOFError:
        raise UserError(f"{path} is truncated: its compressed data ends early, at byte {status.st_size}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from None


class _BoundedReader:
    """The content of a ``.gz`` of ``size`` bytes, up to the limits above."""

    def __init__(self, path: Path, size: int, packed: BufferedIOBase):
        self._path, self._size, self._packed, self._read = path, size, packed, 0
        self._most = max(_MAX_SMALL_UNPACKED_BYTES, _MAX_UNPACKED_RATIO * size)

    def read(self, length: int = -1, /) -> bytes:
        piece = self._packed.read(length)
        self._read += len(piece)
        if self._read > self._most:
            raise UserError(
                f"{self._path} has {self._size:,} bytes and unpacks to more than {self._most:,}; where that is meant, "
                "unpack it with gunzip and name the unpacked file"
            )
        return piece


def derived_file(path: Path, how: str, cache: Path | None, write: Callable[[Path], None]) -> Path:
    """The file that ``write`` derives from ``path``, cached; made once for a file of this path, size and time."""
    key = _digest(str(path.resolve()), file_stamp(path))
    file = (cache or _scratch_folder()) / f"{how}-{key}-{path.name.removesuffix('.gz')}"
    if not file.exists():
        if _only_cached.get():
            raise NotIndexed(str(file))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(file) as part:
                write(part)
        except OSError as error:
            if is_disk_full(error):
                raise UserError(f"no space left in {file.parent} to unpack {path}") from None
            raise
    return file


@functools.cache
def _scratch_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="clasp-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:20]
