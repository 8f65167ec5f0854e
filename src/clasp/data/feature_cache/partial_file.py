"""The partial file of a cache file: what a build writes to, under another name, until it is complete.

Input: the path of a cache file. Output: its partial file, exclusively locked (``flock``), so that a second process that
needs the same rows waits for the first. Note: it stays after an interrupted build, which is resumed from it.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from clasp.data.atomic_files import sync_folder
from clasp.plain_types import UserError

_SUFFIX = ".part"
_BLOCK_BYTES = 512  # of ``st_blocks``, whatever the file system
_log = logging.getLogger(__name__)


class PartialFile(NamedTuple):
    """A file that is being written."""

    path: Path
    file: IO[bytes]

    @property
    def progress(self) -> Path:
        """The file with the progress of the build."""
        return self.path.with_suffix(".part.json")

    def remove(self) -> None:
        """Delete it, so that the next build starts from scratch."""
        self.remove_progress()
        self.path.unlink(missing_ok=True)

    def remove_progress(self) -> None:
        """Delete the progress, on disk when this returns: it must not outlast the file that it is of."""
        if self.progress.exists():
            self.progress.unlink()
            sync_folder(self.path.parent)


def allocated_bytes(path: Path) -> int:
    """Bytes on disk of an unfinished build of the cache file ``path``, which the next build does not need again."""
    try:
        return path.with_suffix(_SUFFIX).stat().st_blocks * _BLOCK_BYTES
    except OSError:  # there is none, or it has just been finished
        return 0


@contextmanager
def lock_partial_file(path: Path, size: int) -> Iterator[PartialFile]:
    """The partial file of ``path``, exclusively locked. The lock is released when the process ends."""
    name = path.with_suffix(_SUFFIX)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise disk_error(path.parent, size, error) from error
        with open(descriptor, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("another process is computing %s; waiting for it", path)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not (name.exists() and os.fstat(file.fileno()).st_ino == name.stat().st_ino):
                continue  # it was renamed while we waited: open it again
            try:
                yield PartialFile(name, file)
            finally:
                if path.exists():
                    PartialFile(name, file).remove()
            return


def disk_error(folder: Path, size: int, error: OSError) -> UserError:
    """The error of a build of ``size`` bytes that the disk refused."""
    return UserError(f"cannot keep {size:,} bytes in {folder}: {error.strerror}")
