"""Checksums of a cache file, a block of bytes at a time, and of its metadata.

Input: the rows of a file, memory-mapped. Output: a CRC-32 for each block of ``BLOCK_BYTES``; later, which rows lie in
blocks that have changed. Note: a file is checked once in a process, when it is opened, front to
back: less than half of the time in which one epoch reads it in shuffled order, and it brings the file into memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from clasp.data.atomic_files import CHECKSUM, has_its_checksum

BLOCK_BYTES = 1 << 20


def block_checksums(stored: Shaped[np.ndarray, "rows columns"]) -> list[int]:
    """The CRC-32 of each block, in order."""
    data = np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data
    return [zlib.crc32(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]


def damaged_rows(stored: Shaped[np.ndarray, "rows columns"], recorded: Sequence[int]) -> Bool[np.ndarray, " rows"]:
    """Which rows lie, with any of their bytes, in a block whose checksum is not the recorded one."""
    found = block_checksums(stored)
    if len(found) != len(recorded):
        raise ValueError(f"{len(recorded)} checksums for {len(found)} blocks")
    damaged = np.zeros(len(stored), dtype=bool)
    row_bytes = stored.shape[1] * stored.itemsize
    for block in (number for number, pair in enumerate(zip(found, recorded, strict=True)) if pair[0] != pair[1]):
        first, end = block * BLOCK_BYTES // row_bytes, -(-(block + 1) * BLOCK_BYTES // row_bytes)
        damaged[first:end] = True
    return damaged


def is_as_written(about: Mapping[str, Any]) -> bool:
    """Whether metadata has its checksum; that of an earlier version, without checksums of blocks, has none."""
    return "blocks" not in about or (CHECKSUM in about and has_its_checksum(about))
