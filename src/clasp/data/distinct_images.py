"""Which pairs have the same image: in a table with a row for each caption, an image is named by several rows.

Input: pairs. Output: ``ImageNumbers``. Note: images are the same where name and version of their sources are, so no
image is read; images that are stored in cells of a table have names of their own. While it counts, a pair takes 16
bytes, whatever the length of names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

from clasp.plain_types import Pair


@dataclass(frozen=True, eq=False)
class ImageNumbers:
    """The images of pairs, numbered in the order in which they first appear."""

    version: str
    """sha256 over ids and image versions, in order"""
    entry: Int64[np.ndarray, " pairs"]
    """The number of the image of each pair"""
    first: Int64[np.ndarray, " images"]
    """The first pair of each image; ascending"""


def number_images(pairs: Iterable[Pair]) -> ImageNumbers:
    """Reads no image, but the size and modification time of every image file."""
    ids, images = hashlib.sha256(), bytearray()
    for pair in pairs:
        version = pair.image.version
        ids.update(f"{pair.id}\0{version}\0".encode("utf-8", "surrogatepass"))
        same = f"{pair.image.name}\0{version}".encode("utf-8", "surrogatepass")
        images += hashlib.blake2b(same, digest_size=16).digest()
    entry, first = _number_rows(np.frombuffer(images, np.uint64).reshape(-1, 2))
    return ImageNumbers(ids.hexdigest(), entry, first)


def _number_rows(keys: UInt64[np.ndarray, "n 2"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " distinct"]]:
    """The number of each row among the distinct ones, by appearance, and the first row of each of these."""
    order = np.lexsort(keys.T)  # stable: of equal rows, the first comes first
    begins = np.ones(len(keys), bool)
    begins[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    first = order[begins]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    entry = np.empty(len(keys), np.int64)
    entry[order] = rank[np.cumsum(begins) - 1]
    return entry, np.sort(first)
