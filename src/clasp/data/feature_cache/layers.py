"""Pooled layers as columns of one cache file: which file holds all layers of a request, and in which of its columns.

Input: a cache folder and the key of a request. Output: ``LayerColumns``: a complete file and its columns. A tower that
pools several layers writes one block of columns for each, listed in the key as ``layers``: [block, width], the last
block first; a key without ``layers`` is of the last block alone. Note: int8 files match whole only, since their
quantisation step is that of a whole row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from clasp.data.feature_cache.dtypes import DTYPE_CODECS


class LayerColumns(NamedTuple):
    """A cache file, and the columns of it that were asked for; ``None``: all of them, in order."""

    file: Path
    columns: Int[np.ndarray, " D"] | None


def find_layers(folder: Path, key: Mapping[str, Any]) -> LayerColumns | None:
    """The file of exactly this key, else one that has its layers among others. ``key`` has no shape."""
    wanted = json.loads(json.dumps(key))  # as it is read back: no tuples
    layers = wanted.pop("layers", [])
    wider: list[LayerColumns] = []
    for file, there in _files(folder):
        if not wanted.items() <= there.items():
            continue
        blocks = there.get("layers", [])
        if blocks == layers:
            return LayerColumns(file, None)
        columns = _columns(blocks, layers or blocks[:1])
        if columns is not None and not DTYPE_CODECS[there["storage"]].extra_columns:
            wider.append(LayerColumns(file, columns))
    return wider[0] if wider else None


def _files(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The complete files of a folder with their keys."""
    for about in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, AttributeError):  # another file, damaged, or just being replaced
            key = json.loads(about.read_text(encoding="utf-8"))["key"]
            if (file := about.with_suffix(".npy")).exists():
                yield file, dict(key)


def _columns(there: list[list[int]], wanted: list[list[int]]) -> Int[np.ndarray, " D"] | None:
    """The columns of the wanted blocks among those that are there; ``None`` unless all are."""
    ends = np.cumsum([width for _, width in there])
    start = {(block, width): end - width for (block, width), end in zip(there, ends.tolist(), strict=True)}
    places = [(start[block, width], width) for block, width in wanted if (block, width) in start]
    if not there or len(places) < len(wanted):
        return None
    return np.concatenate([np.arange(first, first + width) for first, width in places])
