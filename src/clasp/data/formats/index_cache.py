"""On-disk cache of what is derived from a source file: its index, and the unpacked form of a ``.gz``.

Input: a file, and a cache folder or none. Output: arrays, or the path of the unpacked file. Note: an index is saved
only if there is a cache folder; a ``.gz`` must be unpacked for random access, so without a cache folder it goes to a
temporary folder that is removed when the process ends. Entries are keyed by path, size and modification time of the
file, and written atomically. A damaged index is made again, with a warning.
"""

import atexit
import functools
import gzip
import hashlib
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from clasp.data.atomic_files import is_disk_full, replace_file
from clasp.plain_types import UserError

_INDEX_VERSION = "4"  # of the arrays; incrementing it invalidates all saved indices

# a .gz that unpacks to more than both is refused: captions take a tenth to a thirtieth packed, zeros a thousandth
_MAX_UNPACKED_RATIO, _MAX_SMALL_UNPACKED_BYTES = 100, 256 << 20

_log = logging.getLogger(__name__)

IndexArrays = dict[str, np.ndarray]


def file_stamp(path: str | Path) -> str:
    """Size (bytes) and modification time (ns) of a file; changes when its bytes may have changed."""
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def load_or_build_index(cache: Path | None, key: tuple[str, ...], build: Callable[[], IndexArrays]) -> IndexArrays:
    """The arrays of ``build()``, loaded from the cache folder if they were saved under the same key.

    ``key``: the format, the resolved path of the source, and everything else that the arrays depend on.
    """
    assert len(key) > 1, "a key without its source would give one source's arrays to another"
    if cache is None:
        return build()
    file = cache / f"index-{_digest(_INDEX_VERSION, *key)}.npz"
    if file.exists():
        try:
            with (
                file.open("rb") as handle,
                np.load(handle, allow_pickle=False) as saved,
            ):  # a zip, whose checksums are checked here
                return dict(saved)
        except Exception as error:  # damaged bytes raise zip, value, key, header and system errors
            _log.warning("%s: damaged (%s); indexing the pairs again", file, " ".join(str(error).split()))
    arrays = build()
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as part, part.open("wb") as handle:
        np.savez(handle, **arrays)  # pyright: ignore[reportArgumentType]
    return arrays


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
