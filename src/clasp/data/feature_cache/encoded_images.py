"""Rows of images that the same frozen part has encoded before, found by the bytes of the images.

Input: the key of a request, and batches of pixels with the hashes of their files. Output: their rows. ``KEY.images``
beside ``KEY.npy`` has the hash of each image, 0 where it is unknown. Note: a copy of a data set, other captions of the
same images, or a part of them are other requests, and none of their images is encoded again. Hashes have 64 bits: two
of ten million different images are taken for one with probability 3e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor

from clasp.data.atomic_files import replace_file
from clasp.data.feature_cache.arrays import ArrayWriter, CachedArray, read_complete
from clasp.data.feature_cache.layers import complete_files
from clasp.types import Pixels

_SUFFIX = ".images"
_RECENT = 1 << 17  # images of the same build whose rows can be found, one after the other in most data
_OF_IMAGES = ("pairs", "shape")  # of a key: which images, and how many rows
_Encode = Callable[[Pixels], Float[Tensor, "n rows D"]]


@dataclass
class _OtherFile:
    """A complete file of other images of the same part, opened when one of them is found."""

    path: Path
    contents: UInt64[np.ndarray, " images"]
    order: Int[np.ndarray, " images"] = field(init=False)
    opened: CachedArray | None = None

    def __post_init__(self) -> None:
        self.order = np.argsort(self.contents, kind="stable")

    def number_of(self, content: int) -> int | None:
        place = np.searchsorted(self.contents, np.uint64(content), sorter=self.order)
        number = int(self.order[min(int(place), len(self.order) - 1)])
        return number if int(self.contents[number]) == content else None


class EncodedImages:
    """Encodes the images of one build of ``count`` images, each with ``rows`` rows in a file in ``folder``.

    ``reuse``: the rows of an image that was encoded before are copied; the hashes are kept in either case.
    """

    def __init__(self, folder: Path, count: int, rows: int, encode: _Encode, *, reuse: bool) -> None:
        self._folder, self._rows, self._encode, self._reuse = folder, rows, encode, reuse
        self._contents: UInt64[np.ndarray, " count"] = np.zeros(count, np.uint64)
        self._recent = dict[int, int]()
        self._others: list[_OtherFile] | None = None

    def __call__(self, numbers: Sequence[int], pixels: Pixels, writer: ArrayWriter) -> Float[Tensor, "n rows D"]:
        """The rows of some images, which have these numbers in the build."""
        contents = pixels.contents
        if contents is None:  # augmented
            return self._encode(pixels)
        self._contents[list(numbers)] = np.array(contents, np.uint64)
        if not self._reuse:
            return self._encode(pixels)
        distinct = dict.fromkeys(contents)
        found = {content: rows for content in distinct if (rows := self._find(content, writer)) is not None}
        if new := [content for content in distinct if content not in found]:
            found.update(zip(new, self._encode(pixels.select(new)), strict=True))
        if len(self._recent) > _RECENT:
            self._recent.clear()
        self._recent |= dict(zip(contents, numbers, strict=True))
        return torch.stack([found[content] for content in contents])

    def save(self, path: Path) -> None:
        """Keep the hashes beside a file, where some were seen and there are none yet."""
        if self._contents.any() and not path.with_suffix(_SUFFIX).exists():
            with replace_file(path.with_suffix(_SUFFIX)) as part:
                part.write_bytes(self._contents.tobytes())

    def _find(self, content: int, writer: ArrayWriter) -> Float[Tensor, "rows D"] | None:
        if content in self._recent:
            return writer.read(self._rows_of(self._recent[content]))
        if self._others is None:
            self._others = _other_files(self._folder, writer.key)
        for other in self._others:
            if (number := other.number_of(content)) is not None:
                other.opened = other.opened or read_complete(other.path)
                if other.opened is None:  # damaged
                    other.contents = np.zeros_like(other.contents)
                    continue
                return other.opened.take(self._rows_of(number)).float()
        return None

    def _rows_of(self, number: int) -> Int[np.ndarray, " rows"]:
        return np.arange(number * self._rows, (number + 1) * self._rows)


def _other_files(folder: Path, key: Mapping[str, Any]) -> list[_OtherFile]:
    """Those whose key differs in the images alone."""
    about = {name: value for name, value in key.items() if name not in _OF_IMAGES}
    return [
        _OtherFile(file, contents)
        for file, other in complete_files(folder)
        if other != key and {name: value for name, value in other.items() if name not in _OF_IMAGES} == about
        if len(contents := _read_contents(file))
    ]


def _read_contents(file: Path) -> UInt64[np.ndarray, " images"]:
    """The hashes beside a file; none where they are missing, or are not of so many images."""
    try:
        return np.fromfile(file.with_suffix(_SUFFIX), np.uint64)
    except OSError:
        return np.zeros(0, np.uint64)
