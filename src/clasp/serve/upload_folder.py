"""The folder in which a server saves the images that are added by HTTP, and the only one in which it deletes files.

Input: the bytes of an image and the file name that the client gave. Output: a file in the folder. Note: a file is named
after the client's name, of which only letters, digits, ``.``, ``-`` and ``_`` remain, and the start of its hash, with
the suffix of its decoder: the client cannot choose a path, overwrite a file, or give one another type. The same bytes
under the same name are the same file. A file is deleted only if it lies in the folder and bears the hash of the entry:
photographs that somebody else put there stay.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from clasp.data.atomic_files import replace_file
from clasp.data.image_header import IMAGE_MEDIA_TYPES
from clasp.plain_types import UserError

_SUFFIXES = {"image/jpeg": ".jpg", "image/tiff": ".tif"}
UPLOAD_SUFFIXES = {kind: _SUFFIXES.get(kind, f".{kind.partition('/')[2]}") for kind in IMAGE_MEDIA_TYPES.values()}
"""Suffix of a saved file by media type"""
_STEM_CHARS = 40  # with the rest at most 255 bytes, which a file system allows
_HASH_CHARS = 12


class UploadedImage(NamedTuple):
    """What a client sent, its media type by the decoder, and the sha256 of the bytes."""

    data: bytes
    client_name: str
    media_type: str
    sha256: str


class SavedUpload(NamedTuple):
    """A file of the folder. ``is_new``: whether it was not there before."""

    path: Path
    is_new: bool


class UploadFolder:
    """A folder, made if it does not exist. ``UserError`` if it cannot be made or written to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.realpath(os.path.expanduser(path)))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--uploads {path}: cannot make this folder: {error.strerror}") from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UserError(f"--uploads {path}: no files can be written to this folder")

    def save(self, image: UploadedImage) -> SavedUpload:
        """Write the file; it is on disk when this returns. Raises ``OSError``."""
        path = self.path / upload_name(image)
        is_new = not path.exists()
        with replace_file(path) as part:
            part.write_bytes(image.data)
        return SavedUpload(path, is_new)

    def delete(self, path: str, sha256: str) -> bool:
        """Delete the file of an entry if the server saved it; returns whether it did. Raises ``OSError``."""
        file = Path(path)
        saved = file.stem.endswith(f"-{sha256[:_HASH_CHARS]}") and os.path.realpath(file.parent) == str(self.path)
        if saved:
            file.unlink(missing_ok=True)
        return saved


def upload_name(image: UploadedImage) -> str:
    """The file name of an upload."""
    given = PurePosixPath(image.client_name.replace("\\", "/")).stem
    stem = re.sub(r"[^\w.-]+", "-", given)[:_STEM_CHARS].strip(".-_") or "image"
    return f"{stem}-{image.sha256[:_HASH_CHARS]}{UPLOAD_SUFFIXES[image.media_type]}"
