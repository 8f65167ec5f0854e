"""Images inside zips, as ELEVATER's data sets have them.

Input: a zip and the name of a member. Output: its bytes. Note: a zip is opened once per process and read under the lock
of ``zipfile``, so sources are safe in threads and in forked or spawned workers.
"""

import functools
import os
import zipfile
from dataclasses import dataclass

from clasp.data.formats.index_cache import file_stamp
from clasp.data.regular_file import require_size
from clasp.plain_types import UserError


@dataclass(frozen=True, slots=True)
class ZipSource:
    """One member of a zip; ``name`` is ``test.zip::0/1.png``."""

    path: str
    stamp: str
    member: str

    @property
    def name(self) -> str:
        return f"{self.path}::{self.member}"

    @property
    def version(self) -> str:
        return f"{self.stamp}@{self.member}"

    def read(self) -> bytes:
        archive = open_zip(self.path, self.stamp, os.getpid())
        try:
            require_size(self.name, archive.getinfo(self.member).file_size)
            return archive.read(self.member)
        except (KeyError, zipfile.BadZipFile, OSError, RuntimeError) as error:  # RuntimeError: encrypted
            raise UserError(f"{self.name} cannot be read: {error}") from None


@functools.lru_cache(maxsize=16)
def open_zip(path: str, stamp: str, process: int) -> zipfile.ZipFile:
    """The zip, one for each process. Raises ``UserError`` for one that is none, or that was changed."""
    try:
        if file_stamp(path) != stamp:
            raise UserError(f"{path} was changed after it was opened; open the pairs again")
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a whole zip: {error}") from None
