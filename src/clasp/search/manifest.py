"""How a store lies in its folder: a manifest of what counts, a log of JSON lines, and plain writes that can be undone.

In: a folder. Out: the ``Manifest`` and the ``RowLog`` it names, or one line saying what is wrong with them.
Unusual: the other files only grow, and of them counts what ``manifest.json`` names, which is written last, by renaming:
a kill leaves at most a tail that nobody reads and the next write cuts off. A line of the log is
``{"id": ..., "meta": {...}}`` or ``{"id": ..., "deleted": true}``; of one id, the last line holds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from clasp.types import UserError

_FileKind = Literal["vectors", "rows"]

STORE_SUFFIXES: dict[_FileKind, str] = {"vectors": ".f32", "rows": ".jsonl"}
REBUILD_HINT = "delete the folder and type: clasp index RUN FOLDER"
_MANIFEST, _LOCK = "manifest.json", "lock"
_JSON = json.JSONDecoder()
_ID, _DELETED = '{"id": ', ', "deleted": true}'


@dataclass(frozen=True, slots=True)
class Manifest:
    """How much of which files counts. ``model`` is the fingerprint of the model that made the vectors."""

    generation: int = 0
    width: int = 0
    rows: int = 0
    log_bytes: int = 0
    model: str = ""
    name: str = ""
    format: int = 1

    def path(self, folder: Path, kind: _FileKind) -> Path:
        """The file of this generation."""
        return folder / f"{kind}-{self.generation}{STORE_SUFFIXES[kind]}"


class RowLog:
    """What the lines come to: the id of each row, the newest row of each id, and the rows that are dead."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.row: dict[str, int] = {}
        self.dead_rows: list[int] = []
        self._spans = array("q")

    def add(self, name: str, start: int, end: int) -> None:
        """The next row is called ``name``; its line is at these bytes."""
        self.drop(name)
        self.row[name] = len(self.ids)
        self.ids.append(name)
        self._spans.extend((start, end))

    def drop(self, name: str) -> None:
        """The row of this id, if there is one, is dead."""
        if name in self.row:
            self.dead_rows.append(self.row.pop(name))

    def span(self, row: int) -> slice:
        """Where in the file the line of a row is, bytes."""
        return slice(self._spans[2 * row], self._spans[2 * row + 1])


# --- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """What counts; nothing in a folder that is empty or not there. ``UserError`` for one that holds something else."""
    path = folder / _MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        numbers = (manifest.generation, manifest.width, manifest.rows, manifest.log_bytes)
        if manifest.format != 1 or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError
    except FileNotFoundError:
        _refuse_foreign(folder)
        return Manifest()
    except NotADirectoryError:
        raise UserError(f"{folder} is a file, not the folder of a store") from None
    except (ValueError, TypeError):
        known = ", ".join(field.name for field in fields(Manifest))
        raise UserError(f"{path} is damaged or of another clasp (it should give {known}); {REBUILD_HINT}") from None
    return manifest


def _refuse_foreign(folder: Path) -> None:
    """A folder without manifest is a new store if it is empty, or holds what a kill before the first one leaves."""
    ours = (_MANIFEST, _LOCK, *(f"{kind}-" for kind in STORE_SUFFIXES))
    others = [entry for entry in sorted(os.listdir(folder)) if not entry.startswith(ours)] if folder.exists() else []
    if others:
        raise UserError(f"{folder} is not a store: it has no {_MANIFEST}, but {', '.join(others[:3])}")


def read_row_log(folder: Path, manifest: Manifest) -> RowLog:
    """What the lines that count come to. Metadata is not parsed here, only when it is asked for."""
    log, end = RowLog(), 0
    if not manifest.log_bytes:
        return log
    path = manifest.path(folder, "rows")
    with path.open("rb") as file:
        for line in file:
            if end >= manifest.log_bytes:
                break
            start, end = end, end + len(line)
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
    return log


# --- writing ---------------------------------------------------------------------------------------------------------


def encode_row(name: str, meta: Mapping[str, Any]) -> bytes:
    """The line that adds a row."""
    return _line({"id": name, "meta": dict(meta)})


def encode_deletion(name: str) -> bytes:
    """The line that makes an id forgotten."""
    return _line({"id": name, "deleted": True})


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")  # names need not be Unicode


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """From here on, this is what counts."""
    part = folder / f"{_MANIFEST}.part"
    write_at(part, 0, [(json.dumps(asdict(manifest), indent=2) + "\n").encode()])
    os.replace(part, folder / _MANIFEST)
    with contextlib.suppress(OSError):  # not every file system can; and it counts already
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)  # else the new name may be lost with the power
        finally:
            os.close(directory)


def write_at(path: Path, at: int, pieces: Iterable[bytes | memoryview]) -> None:
    """Make the file ``at`` bytes long, then write. Not through a map, where a full disk would be a bus error."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        file.seek(at)
        file.truncate()
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def lock_store(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed, if only by the death of the process."""
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
