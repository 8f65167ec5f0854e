"""Arrays on disk that are computed once: ``KEY.npy``, float32 and memory-mapped, with ``KEY.json`` beside it.

In: a key, which is everything that decides the values, and a function that writes the rows in any order. Out: the
rows, from disk if they are there. KEY is a hash of the key; the ``.json`` says what the file is, to people and to us.
Unusual: a file is written under another name and renamed when whole, so there is never half a one; what is cut short
or not ours is computed again, and the log says so. A full disk is found before the computing where it can be.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float, Int

from clasp.types import UserError

_FORMAT = 1  # raise it when the same key could mean other values
_PROBED = 64  # rows whose hash tells a foreign or half-written file from ours without reading all of it
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Kept:
    """An array on disk; ``about`` is its ``.json``: key, shape, dtype, seconds, and the notes of its writer."""

    path: Path
    values: Float[np.ndarray, "*shape"]
    about: Mapping[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process maps the file again; pickling the map would copy all of it
        return _mapped, (self.path, self.about)


class Writer:
    """The rows of an array while it is written; ``notes`` go into its ``.json``. What is not written is zero."""

    def __init__(self, file: IO[bytes], shape: tuple[int, ...]) -> None:
        self.notes: dict[str, Any] = {}
        self._file = file
        self._row_bytes = 4 * shape[-1]
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        self._start = file.tell()
        file.truncate(self._start + 4 * math.prod(shape))

    def write(self, rows: Int[np.ndarray, " n"], values: Float[np.ndarray, "n D"]) -> None:
        """``values`` at ``rows``, which count through all axes but the last.

        These are plain writes, since in a map a full disk would be a bus error.
        """
        for row, value in zip(rows.tolist(), np.ascontiguousarray(values, dtype="<f4"), strict=True):
            self._file.seek(self._start + self._row_bytes * row)
            self._file.write(value)


def cached(folder: Path, key: Mapping[str, Any], shape: tuple[int, ...], fill: Callable[[Writer], None]) -> Kept:
    """The array of ``key`` (plain data); ``fill`` is called to write its rows if ``folder`` does not hold it whole.

    Raises ``UserError`` when ``folder`` cannot be written to or has no space left.
    """
    assert math.prod(shape) > 0, f"nothing to keep: {shape}"
    key = json.loads(json.dumps(key))  # as it will be read back: no tuples
    name = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{name}.npy"
    if path.exists():
        try:
            return _read(path, key, shape)
        except _Unusable as reason:
            _log.warning("%s: %s; computing it again", path, reason)
    with _new_file(path, key, shape) as writer:
        fill(writer)
    return _read(path, key, shape)


class _Unusable(Exception):
    """Why a file is not the one looked for."""


def _read(path: Path, key: Mapping[str, Any], shape: tuple[int, ...]) -> Kept:
    try:
        kept = _mapped(path, json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        same = kept.about["key"] == key and kept.values.shape == shape and kept.values.dtype == np.float32
        if not (same and kept.about["probe"] == _probe(kept.values)):
            raise _Unusable("these are not the values that were written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Unusable(f"cut short or damaged ({error})") from error
    return kept


def _mapped(path: Path, about: Mapping[str, Any]) -> Kept:
    return Kept(path, np.lib.format.open_memmap(path, mode="r"), about)


def _probe(values: np.ndarray) -> str:
    """A hash of some rows, evenly spaced."""
    rows = np.linspace(0, len(values) - 1, _PROBED).astype(np.int64)
    return hashlib.sha256(np.ascontiguousarray(values[rows]).tobytes()).hexdigest()


@contextmanager
def _new_file(path: Path, key: Mapping[str, Any], shape: tuple[int, ...]) -> Iterator[Writer]:
    """An array to be filled, then renamed to ``path``, its ``.json`` after it. Leaves nothing behind on any error."""
    folder, size = path.parent, 4 * math.prod(shape)
    part = folder / f"{path.stem}.{uuid.uuid4().hex}.part"
    note = part.with_suffix(".json.part")
    started = time.monotonic()
    file = _opened(part, size)
    try:
        with file:
            if shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            writer = Writer(file, shape)
            yield writer
            file.flush()
            os.fsync(file.fileno())
        about = {"key": key, "shape": shape, "dtype": "float32", "seconds": round(time.monotonic() - started, 3)}
        about |= {**writer.notes, "probe": _probe(np.lib.format.open_memmap(part, mode="r"))}
        note.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
        os.replace(note, path.with_suffix(".json"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _refused(folder, size, error) from error
    finally:
        part.unlink(missing_ok=True)
        note.unlink(missing_ok=True)


def _opened(part: Path, size: int) -> IO[bytes]:
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        return open(part, "xb")
    except OSError as error:
        raise _refused(part.parent, size, error) from error


def _refused(folder: Path, size: int, error: OSError) -> UserError:
    return UserError(f"cannot keep {size:,} bytes in {folder}: {error.strerror}")
