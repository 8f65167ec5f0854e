"""Reads a regular file of bounded size; anything else is refused before a byte is read.

Input: a path, perhaps of somebody else's data set. Output: its bytes. Note: a pipe would wait for its writer, a device
may never end, and a sparse file of gigabytes takes no space until it is read.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from clasp.errors import UserError

MAX_IMAGE_BYTES = 1 << 29
_KINDS = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def read_regular_file(path: str | Path, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of a file. Raises ``UserError`` for what is no regular file or is larger; ``OSError`` as ``open``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else opening a pipe waits for its writer
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            kind = next((name for test, name in _KINDS if test(status.st_mode)), "a device")
            raise UserError(f"{path} is {kind}, not a regular file")
        require_size(str(path), status.st_size, max_bytes)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def require_size(name: str, size: int, max_bytes: int = MAX_IMAGE_BYTES) -> None:
    """Raises ``UserError`` for more than ``max_bytes``."""
    if size > max_bytes:
        raise UserError(f"{name} has {size:,} bytes; at most {max_bytes:,} are read of one image or caption file")
