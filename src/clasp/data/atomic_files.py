"""Writes files so that a kill, a full disk or a power failure leaves the old content or the new, never a part of it.

Input: a path with its text, its lines, or a function that writes it. Output: the file, complete and on disk. Every
writer of run folders and caches uses this module: a temporary name beside the file, ``fsync`` of the file, rename,
``fsync`` of the folder. Note: the search store (``search.manifest``) appends in place and has its own protocol. Two
processes never share a temporary name, but the last rename wins: ``data.folder_lock`` keeps a second writer out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clasp.errors import UserError

PARTIAL_SUFFIX = ".part"
TORN_SUFFIX = ".torn"
_log = logging.getLogger(__name__)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it at the end of the block, and is deleted if the block raises.

    The file has the mode of any new file, also where a library creates it as private.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        yield part
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Write the names of a folder to disk, else a power failure may undo a rename in it."""
    with contextlib.suppress(OSError):  # not every file system supports it, and the rename is done
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Write a file to disk, if it exists, else a power failure may undo lines that were appended."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Write a folder with all that is in it to disk, so that a rename may follow."""
    for path in (folder, *folder.rglob("*")):
        (sync_folder if path.is_dir() else sync_file)(path)


def write_text_file(path: Path, text: str) -> None:
    """Replace a text file."""
    with replace_file(path) as part:
        part.write_text(text, encoding="utf-8")


def remove_partial_files(folder: Path) -> None:
    """Delete what killed writers left; only for a folder that no other process writes to."""
    for part in folder.glob(f"*{PARTIAL_SUFFIX}"):
        part.unlink(missing_ok=True)


# --- JSON lines ------------------------------------------------------------------------------------------------------


def append_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Add a line for each row, all in one write.

    A last line that a kill has torn is moved to ``path`` + ``.torn``, with a warning, so that it is not joined to the
    next. A lone surrogate, from a file name that is not UTF-8, becomes the escape that JSON has for it.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), "r+b", buffering=0) as file:
        _set_torn_line_aside(path, file.fileno())
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        while data:
            data = data[os.write(file.fileno(), data) :]


def _set_torn_line_aside(path: Path, descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    if not size or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    whole = os.pread(descriptor, size, 0)
    end = whole.rfind(b"\n") + 1
    if _is_object(whole[end:]):
        os.write(descriptor, b"\n")
        return
    torn = path.with_name(path.name + TORN_SUFFIX)
    with torn.open("ab") as file:
        file.write(whole[end:] + b"\n")
        os.fsync(file.fileno())
    os.ftruncate(descriptor, end)
    _log.warning("%s: its last line was torn by a kill or a full disk; it is set aside in %s", path, torn.name)


def _is_object(line: bytes) -> bool:
    """Whether a line without its end is whole, as an editor may leave it: no part of an object is one."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_json_lines(path: Path) -> list[Any]:
    """The values of the lines, without a last line that a kill has torn. Raises ``UserError`` for a damaged one."""
    *lines, last = path.read_bytes().split(b"\n")
    if _is_object(last):
        lines.append(last)
    elif last.strip():
        _log.warning("%s: its last line is torn, and left out", path)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():  # an editor may leave empty ones
                rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged in line {number}, which may be deleted: {error}") from None
    return rows


# --- checksums of rows -----------------------------------------------------------------------------------------------

CHECKSUM = "checksum"


def with_checksum(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the CRC-32 of its JSON as one more field, ``checksum``."""
    return {**row, CHECKSUM: zlib.crc32(json.dumps(without_checksum(row), sort_keys=True).encode())}


def has_its_checksum(row: Mapping[str, Any]) -> bool:
    """Whether a row is as ``with_checksum`` returned it; also true of one of an earlier clasp, without a checksum."""
    return CHECKSUM not in row or with_checksum(row)[CHECKSUM] == row[CHECKSUM]


def without_checksum(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they were given."""
    return {name: value for name, value in row.items() if name != CHECKSUM}


# --- errors ----------------------------------------------------------------------------------------------------------

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error is that of a full disk; safetensors and tokenizers hide the system's error in their text."""
    return (isinstance(error, OSError) and error.errno in _FULL) or "No space left" in str(error)


@contextmanager
def translate_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a path that cannot be written into a ``UserError``; earlier files stay."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"no space left to write {path}; nothing saved before is lost") from None
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            made = Path(os.fsdecode(error.filename))
            folder = made.parent
            if not folder.exists() and (folder == path.parent or folder.is_relative_to(path)):
                raise UserError(f"{folder} is gone: it was moved or deleted while it was written to") from None
            staged = made.name.startswith(f".{path.name}-")
            if folder.exists() and (staged or path.is_relative_to(made)):  # as in /proc, where nothing can be made
                raise UserError(f"{path} cannot be written: {error.strerror}") from None
        refused = isinstance(error, PermissionError | FileExistsError | NotADirectoryError | IsADirectoryError)
        if refused or (isinstance(error, OSError) and error.errno == errno.EROFS):
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        raise
