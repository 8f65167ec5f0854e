"""A memory-mapped float32 matrix whose rows are compared with their checksums when they are first read.

Input: the file, its shape, and the CRC-32 of each block of rows. Output: rows; ``UserError`` where a block is not what
was written. Note: opening reads nothing. A process compares a block once, also where the file is opened again or has
grown since: of one that grows, the last block alone is read a second time.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from clasp.plain_types import UserError
from clasp.search.manifest import REBUILD_HINT, ROWS_PER_BLOCK, require_checksum

# path -> inode, and first row of a block -> the CRC-32 that this process has compared it with
_compared: dict[Path, tuple[int, dict[int, int]]] = {}


@dataclass(frozen=True, slots=True)
class BlockChecksums:
    """The CRC-32 of each block; the last one may have fewer rows. No values: nothing is compared."""

    values: tuple[int, ...]
    rows_per_block: int = ROWS_PER_BLOCK


class VerifiedMatrix:
    """Rows ``[rows E]`` of a file. ``UserError`` where it is too short, ``FileNotFoundError`` where it is missing."""

    def __init__(self, path: Path, shape: tuple[int, int], checksums: BlockChecksums) -> None:
        self._path, self._checksums = path, checksums
        self._values: np.ndarray = np.empty(shape, "<f4") if 0 in shape else _map(path, shape)
        self._known: dict[int, int] = {}
        if len(self._values):
            inode = path.stat().st_ino
            if path not in _compared or _compared[path][0] != inode:
                _compared[path] = (inode, {})
            self._known = _compared[path][1]

    def __len__(self) -> int:
        return len(self._values)

    def all(self) -> Float32[np.ndarray, "rows E"]:
        """Every row: the map itself, not a copy."""
        for block in range(len(self._checksums.values)):
            self._compare(block)
        return self._values

    def rows(self, numbers: Sequence[int]) -> Float32[np.ndarray, "n E"]:
        """A copy of these rows."""
        if self._checksums.values:
            for block in sorted({number // self._checksums.rows_per_block for number in numbers}):
                self._compare(block)
        return self._values[np.asarray(numbers, np.intp)]

    def _compare(self, block: int) -> None:
        start = block * self._checksums.rows_per_block
        recorded = self._checksums.values[block]
        if self._known.get(start) != recorded:
            rows = self._values[start : start + self._checksums.rows_per_block]
            require_checksum(self._path, zlib.crc32(rows.data), recorded)
            self._known[start] = recorded


def extend_checksums(values: Sequence[int], rows: int, added: Float32[np.ndarray, "n E"]) -> tuple[int, ...]:
    """The checksums of blocks after ``added`` is appended to ``rows`` rows, whose checksums are ``values``."""
    made, start = list(values), 0
    while start < len(added):
        filled = (rows + start) % ROWS_PER_BLOCK
        part = added[start : start + ROWS_PER_BLOCK - filled]
        made.append(zlib.crc32(np.ascontiguousarray(part).data, made.pop() if filled else 0))
        start += len(part)
    return tuple(made)


def _map(path: Path, shape: tuple[int, int]) -> np.ndarray:
    size, needed = path.stat().st_size, 4 * shape[0] * shape[1]
    if size < needed:
        raise UserError(f"{path} is cut short: {size} bytes, not {needed}; {REBUILD_HINT}")
    return np.memmap(path, "<f4", "r", shape=shape).view(np.ndarray)
