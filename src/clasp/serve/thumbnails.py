"""Thumbnails of indexed images, made once and kept on disk.

Input: the sha256 of an image and a function that reads its bytes. Output: a WebP image of at most ``THUMBNAIL_SIDE``
pixels a side. Note: files are named by the hash of the bytes, so a changed image has another thumbnail and a renamed
one the same. Written to a temporary name and renamed; where the folder cannot be written, each is made anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from clasp.data.decoding import shrink_to_fit
from clasp.data.image_header import read_image_header

THUMBNAIL_SIDE = 400
"""Pixels of the longer side: twice what the page shows, for dense screens"""
THUMBNAIL_MEDIA_TYPE = "image/webp"
_QUALITY = 80


class ThumbnailCache:
    """Thumbnails in a folder, two levels deep, created with the first."""

    def __init__(self, folder: Path, max_pixels: int) -> None:
        self._folder, self._max_pixels = folder, max_pixels
        self._makers = threading.Semaphore(max(1, (os.cpu_count() or 1) // 2))  # decoding leaves room for the model

    def get(self, sha256: str, read: Callable[[], bytes]) -> bytes:
        """The thumbnail. Raises ``ImageError`` for an image that cannot be decoded, and what ``read`` raises."""
        path = self._path(sha256)
        with suppress(OSError):
            return path.read_bytes()
        with self._makers:
            data = read()
            read_image_header(data, self._max_pixels)
            made = shrink_to_fit(data, THUMBNAIL_SIDE, "WEBP", _QUALITY)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
            part.write_bytes(made)
            os.replace(part, path)
        return made

    def discard(self, sha256: str) -> None:
        """Delete the thumbnail, if there is one."""
        with suppress(OSError):
            self._path(sha256).unlink()

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / f"{sha256}.webp"
