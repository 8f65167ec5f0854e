"""Ids of pairs: unique, and independent of the order of the rows and of the location of the folder.

Input: the rows of a table. Output: two arrays, the duplicate number and the id hash of each row. Note: the id of a row
without one is its image path; rows of the same image are ``path#1``, ``path#2``, ordered by the hashes of their
captions. Only hashes are in memory while a table is opened: 24 bytes a row.
"""

import hashlib
import os.path
from array import array

import numpy as np
from jaxtyping import UInt32, UInt64

from clasp.data.formats.base import OpenedSource
from clasp.data.formats.rows import CaptionCheck, PairRow
from clasp.plain_types import UserError


def image_id(image: str, root: str) -> str:
    """The normalised image path, relative to ``root`` if it is inside, so that the folder can be moved."""
    path = os.path.normpath(image)
    return os.path.relpath(path, root) if path.startswith(root.rstrip(os.sep) + os.sep) else path


class IdCollector:
    """Collects, in one pass over the rows of a table, the hashes that ids and groups are derived from."""

    def __init__(self, name: str):
        self.captions = CaptionCheck(name)
        self.ids, self.images, self.texts = array("Q"), array("Q"), array("Q")

    def add(self, where: str, row: PairRow, image: str) -> None:
        self.captions.add(where, row.captions)
        self.ids.append(hash64(row.id) if row.id else 0)
        self.images.append(hash64(image))
        self.texts.append(hash64(repr(row.captions)))

    def finish(self) -> dict[str, np.ndarray]:
        """``twins``: 0 for the only row of its image, else its number from 1. ``hashes``: those of the ids."""
        self.captions.finish()
        ids, images, texts = (np.array(values, np.uint64) for values in (self.ids, self.images, self.texts))
        twins = number_duplicates(images, texts)
        return {"twins": twins, "hashes": np.where(ids != 0, ids, images + twins * np.uint64(0x9E3779B97F4A7C15))}


def number_duplicates(
    images: UInt64[np.ndarray, " rows"], texts: UInt64[np.ndarray, " rows"]
) -> UInt32[np.ndarray, " rows"]:
    """Rows with equal ``images`` are numbered from 1 in ascending order of ``texts``; a unique one is 0."""
    order = np.lexsort((texts, images))
    first = np.diff(images[order], prepend=~images[order[:1]]) != 0
    place = np.arange(len(order))
    number = place - np.maximum.accumulate(np.where(first, place, 0)) + 1
    number[first & np.append(first[1:], True)] = 0
    twins = np.empty(len(order), np.uint32)
    twins[order] = number
    return twins


def require_unique_ids(name: str, opened: OpenedSource) -> None:
    """``UserError`` when two pairs of one source have the same id."""
    order = np.argsort(opened.hashes, kind="stable")
    ordered = opened.hashes[order]
    for place in np.flatnonzero(ordered[1:] == ordered[:-1]):
        a, b = int(order[place]), int(order[place + 1])
        if opened[a].id == opened[b].id:  # rules out hash collisions
            raise UserError(f"{name}: the id {opened[a].id!r} is given twice, by pairs {a + 1} and {b + 1}")


def hash64(text: str) -> int:
    """A stable 64-bit hash, never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
