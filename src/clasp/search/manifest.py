"""File layout of a store: a manifest of the valid lengths, an append-only log of JSON lines, and truncating writes.

Input: a folder. Output: its ``Manifest`` and ``RowLog``, or one line saying what is wrong with them. Note: the other
files only grow; valid is the part that ``manifest.json`` records, with its CRC-32, which is written last, atomically by
renaming: a kill leaves at most a tail that is not read and that the next write truncates. A line of the log is
``{"id": ..., "meta": {...}}`` or ``{"id": ..., "deleted": true}``; the last line of an id wins.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from clasp.plain_types import UserError

_FileKind = Literal["vectors", "rows"]

STORE_SUFFIXES: dict[_FileKind, str] = {"vectors": ".f32", "rows": ".jsonl"}
ROWS_PER_BLOCK = 1 << 12
"""Vectors with a checksum of their own; a part of the format"""
REBUILD_HINT = "delete this index (not the run) and type: clasp index RUN FOLDER"
_MANIFEST, _LOCK = "manifest.json", "lock"
_JSON = json.JSONDecoder()
_ID, _DELETED = '{"id": ', ', "deleted": true}'


@dataclass(frozen=True, slots=True)
class Manifest:
    """Which files are current, their valid lengths and the CRC-32 of these (``None``: written by an earlier clasp).

    ``model``: fingerprint of the model of the vectors. ``block_checksums``: of each ``ROWS_PER_BLOCK`` of the vectors;
    an earlier clasp wrote ``vectors_checksum`` in their place, of all vectors.
    """

    generation: int = 0
    width: int = 0
    rows: int = 0
    log_bytes: int = 0
    model: str = ""
    name: str = ""
    format: int = 1
    vectors_checksum: int | None = None
    rows_checksum: int | None = None
    block_checksums: tuple[int, ...] | None = None

    def path(self, folder: Path, kind: _FileKind) -> Path:
        """The file of this kind, of this generation."""
        return folder / f"{kind}-{self.generation}{STORE_SUFFIXES[kind]}"


class DamagedStoreError(UserError):
    """The files of a store are not what was written to them: no fault of a request."""


class RowLog:
    """The parsed log: the id of each row, the newest row of each id, and the dead (replaced or deleted) rows."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.row: dict[str, int] = {}
        self.dead_rows: list[int] = []
        self._spans = array("q")

    def add(self, name: str, start: int, end: int) -> None:
        """Append a row with the id ``name``, whose line is at these bytes."""
        self.drop(name)
        self.row[name] = len(self.ids)
        self.ids.append(name)
        self._spans.extend((start, end))

    def copy(self) -> RowLog:
        """The same log, to be changed on its own."""
        made = RowLog()
        made.ids, made.row, made.dead_rows = self.ids.copy(), self.row.copy(), self.dead_rows.copy()
        made._spans = self._spans[:]
        return made

    def drop(self, name: str) -> None:
        """Mark the row of this id, if there is one, as dead."""
        if name in self.row:
            self.dead_rows.append(self.row.pop(name))

    def span(self, row: int) -> slice:
        """Byte range of the line of a row in the file."""
        return slice(self._spans[2 * row], self._spans[2 * row + 1])


# --- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest; an empty one for an empty or missing folder. ``UserError`` for a folder that is not a store."""
    path = folder / _MANIFEST
    try:
        manifest = _manifest_of(**json.loads(path.read_text(encoding="utf-8")))
        numbers = (manifest.generation, manifest.width, manifest.rows, manifest.log_bytes)
        numbers += tuple(each for each in (manifest.vectors_checksum, manifest.rows_checksum) if each is not None)
        blocks = manifest.block_checksums
        numbers += blocks or ()
        if manifest.format != 1 or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError
        if blocks is not None and len(blocks) != -(-manifest.rows // ROWS_PER_BLOCK):
            raise ValueError
    except FileNotFoundError:
        _refuse_foreign(folder)
        return Manifest()
    except NotADirectoryError:
        raise UserError(f"{folder} is a file, not the folder of a store") from None
    except (ValueError, TypeError, RecursionError):
        known = ", ".join(field.name for field in fields(Manifest))
        raise UserError(f"{path} is damaged or of another clasp (it should give {known}); {REBUILD_HINT}") from None
    return manifest


def _manifest_of(*, block_checksums: Sequence[int] | None = None, **others: Any) -> Manifest:
    return Manifest(**others, block_checksums=None if block_checksums is None else tuple(block_checksums))


def _refuse_foreign(folder: Path) -> None:
    """A folder without manifest is a new store if it is empty, or has only files of an interrupted first write."""
    ours = (_MANIFEST, _LOCK, *(f"{kind}-" for kind in STORE_SUFFIXES))
    others = [entry for entry in sorted(os.listdir(folder)) if not entry.startswith(ours)] if folder.exists() else []
    if others:
        raise UserError(f"{folder} is not a store: it has no {_MANIFEST}, but {', '.join(others[:3])}")


def read_row_log(folder: Path, manifest: Manifest) -> RowLog:
    """Parse the valid lines, ids only; metadata is parsed when it is read. ``UserError`` for a damaged log."""
    log, end, checksum = RowLog(), 0, 0
    if not manifest.log_bytes:
        return log
    path = manifest.path(folder, "rows")
    with path.open("rb") as file:
        for line in file:
            if end >= manifest.log_bytes:
                break
            start, end, checksum = end, end + len(line), zlib.crc32(line, checksum)
            try:
                text = line.decode("utf-8", "surrogatepass")
                name, stop = _JSON.raw_decode(text, len(_ID))
            except ValueError:
                raise UserError(f"{path} is damaged at byte {start}; {REBUILD_HINT}") from None
            if text.startswith(_DELETED, stop):
                log.drop(name)
            else:
                log.add(name, start, end)
    if end != manifest.log_bytes or len(log.ids) != manifest.rows:
        counts = f"{len(log.ids)} rows in {end} bytes, not {manifest.rows} in {manifest.log_bytes}"
        raise UserError(f"{path} is cut short or not of this store: {counts}; {REBUILD_HINT}")
    require_checksum(path, checksum, manifest.rows_checksum)
    return log


def require_checksum(path: Path, found: int, recorded: int | None) -> None:
    """``DamagedStoreError`` where the content of a file is not what was written to it."""
    if recorded is not None and found != recorded:
        raise DamagedStoreError(f"{path} is damaged: its checksum is {found:08x}, not {recorded:08x}; {REBUILD_HINT}")


# --- writing ---------------------------------------------------------------------------------------------------------


def encode_row(name: str, meta: Mapping[str, Any]) -> bytes:
    """The line that adds a row."""
    return _line({"id": name, "meta": dict(meta)})


def encode_deletion(name: str) -> bytes:
    """The line that deletes an id."""
    return _line({"id": name, "deleted": True})


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")  # names need not be Unicode


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically; this commits a write."""
    part = folder / f"{_MANIFEST}.part"
    write_at(part, 0, [(json.dumps(asdict(manifest), indent=2) + "\n").encode()])
    os.replace(part, folder / _MANIFEST)
    with contextlib.suppress(OSError):  # not every file system supports it, and the rename is done
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)  # else a power failure may lose the rename
        finally:
            os.close(directory)


def write_at(path: Path, at: int, pieces: Iterable[bytes | memoryview], checksum: int = 0) -> int:
    """Truncate the file to ``at`` bytes, whose CRC-32 is ``checksum``, then append; returns the CRC-32 of the whole.

    Not through a memory map, where a full disk is a bus error.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        file.seek(at)
        file.truncate()
        for piece in pieces:
            file.write(piece)
            checksum = zlib.crc32(piece, checksum)
        file.flush()
        os.fsync(file.fileno())
    return checksum


def lock_store(folder: Path) -> int:
    """A descriptor that holds the write lock of the folder until it is closed or the process ends."""
    import fcntl  # not on every system; reading needs no lock

    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise UserError(f"{folder} is being written to elsewhere; try again when that is done") from None
    return descriptor
