"""Image sources: a file, or a byte range of a tar.

Input: a location, as plain data. Output: bytes, read lazily. Note: file descriptors are cached per process and read
with ``pread``, which has no shared cursor, so sources are safe in threads and in forked or spawned workers, and pickle
as a few strings. POSIX only.
"""

import functools
import os
import re
import unicodedata
import weakref
from dataclasses import dataclass
from typing import ClassVar

from clasp.data.formats.index_cache import file_stamp
from clasp.data.formats.rows import shorten
from clasp.data.formats.setting_hints import OutsideRootError
from clasp.data.regular_file import read_regular_file, require_size
from clasp.plain_types import UserError


@dataclass(frozen=True, slots=True)
class FileSource:
    """An image file. It is checked when it is read: ``UserError`` if it does not exist, or is no regular file.

    The path is tried in both Unicode normalisations (NFC, NFD), since some file systems change them.
    """

    path: str
    MISSING: ClassVar = "missing"
    """The version of a file that cannot be found: it does not exist, or is in a folder that may not be entered"""

    @property
    def name(self) -> str:
        return self.path

    @property
    def version(self) -> str:
        try:
            return file_stamp(_on_disk(self.path))
        except OSError:
            return self.MISSING

    def read(self) -> bytes:
        try:
            return read_regular_file(_on_disk(self.path))
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None


def _on_disk(path: str) -> str:
    """The path, or its other Unicode normalisation if only that exists."""
    if path.isascii() or os.path.exists(path):
        return path
    others = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return next((other for other in others if os.path.exists(other)), path)


def require_inside(path: str, root: str, where: str) -> None:
    """``OutsideRootError`` for an image path that leads out of ``root``, which the user did not name."""
    whole = os.path.normpath(os.path.join(root, path))
    if whole != root and not whole.startswith(root.rstrip(os.sep) + os.sep):
        raise OutsideRootError(f"{where}: the image path {shorten(path)} leads out of {root}")


def names_address(path: str) -> bool:
    """Whether this is an address such as ``https://…`` and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def require_no_address(path: str, where: str) -> None:
    """``UserError`` for an address in place of a path."""
    if names_address(path):
        raise UserError(f"{where}: {shorten(path)} is an address, and nothing is downloaded; name a file on this disk")


@dataclass(frozen=True, slots=True)
class TarSource:
    """``size`` bytes at ``offset`` of an uncompressed tar; ``name`` is ``shard.tar::member.jpg``."""

    name: str
    path: str
    stamp: str
    offset: int
    size: int

    @property
    def version(self) -> str:
        return f"{self.stamp}@{self.offset}+{self.size}"

    def read(self) -> bytes:
        require_size(self.name, self.size)
        return read_range(self.path, self.stamp, self.offset, self.size)


def read_range(path: str, stamp: str, offset: int, size: int) -> bytes:
    """``size`` bytes at ``offset``; ``UserError`` if the file no longer has the stamp of its index."""
    descriptor = _open_descriptor(path, stamp).descriptor
    data = os.pread(descriptor, size, offset)
    if len(data) < size:
        raise UserError(f"{path} is truncated: it ends at byte {offset + len(data)}, before {offset + size}")
    if file_stamp(descriptor) != stamp:  # rewritten in place
        raise UserError(f"{path} was changed after it was opened; open the pairs again")
    return data


class _FileDescriptor:
    """A file descriptor that is closed when it is garbage-collected."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


@functools.lru_cache(maxsize=128)
def _open_descriptor(path: str, stamp: str) -> _FileDescriptor:
    try:
        if file_stamp(path) != stamp:
            raise UserError(f"{path} was changed after it was opened; open the pairs again")
        return _FileDescriptor(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
