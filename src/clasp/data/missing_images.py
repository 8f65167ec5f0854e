"""Pairs of which too many images are missing: a table that was moved, whose paths start from another folder, or whose
images are in a folder that may not be entered, or were fetched in part.

Input: pairs, how many images may be missing, and what to set. Output: none, or a ``UserError`` that ends with why the
first cannot be read. Note: it looks at some rows first, and at all of them where too many of these are missing, so it
is cheap before towers are loaded. Fewer are counted when they are read, by the same limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from jaxtyping import Int

from clasp.data.formats.setting_hints import SettingHints
from clasp.data.formats.sources import FileSource
from clasp.data.pair_sequence import Pairs
from clasp.errors import counted
from clasp.plain_types import Pair, UserError

_LOOKED_AT = 1024  # rows, drawn at random, that are looked at first
_ALWAYS_ALLOWED = 3
_NAMED = 3


def too_many(bad: int, total: int, max_bad_fraction: float) -> bool:
    """Whether so many bad samples stop a run: more than ``max(3, max_bad_fraction * total)``, or all."""
    return bad > max(_ALWAYS_ALLOWED, max_bad_fraction * total) or bad >= total


def require_images(hints: SettingHints, *opened: Pairs, max_bad_fraction: float | None = None) -> None:
    """Raises ``UserError`` where more images of some pairs than ``max_bad_fraction`` allows are files that cannot be
    found, or where all are. Reads no image that can."""
    allowed = 1.0 if max_bad_fraction is None else max_bad_fraction
    for pairs in opened:
        some = np.random.default_rng(0).choice(len(pairs), min(len(pairs), _LOOKED_AT), replace=False, shuffle=False)
        missing = sum(1 for _ in _missing(pairs, np.sort(some)))
        if missing and (missing == len(some) or missing > allowed * len(some)):
            _require_few(hints, pairs, max_bad_fraction)


def _require_few(hints: SettingHints, pairs: Pairs, max_bad_fraction: float | None) -> None:
    everything = np.arange(len(pairs))
    missing = _missing(pairs, everything)
    first = list(islice(missing, _NAMED))
    rows = len(first) + sum(1 for _ in missing)
    if rows == len(pairs):
        what = f"none of its {counted(rows, 'image')} can be found"
    elif max_bad_fraction is not None and too_many(rows, len(pairs), max_bad_fraction):
        bad, total = _count_images(_missing(pairs, everything)), _count_images(pairs)
        if not too_many(bad, total, max_bad_fraction):
            return  # what reads an image once counts it once
        names = ", ".join(pair.image.name for pair in first)
        what = f"{bad:,} of its {counted(total, 'image')} cannot be found, which is more than data.max_bad_fraction = "
        what += f"{max_bad_fraction:g} allows: {names}{', …' if rows > _NAMED else ''}"
    else:
        return
    try:
        first[0].image.read()
    except UserError as error:
        raise UserError(f"{pairs.name}: {what}; {hints.images}; {error}") from None


def _missing(pairs: Pairs, numbers: Int[np.ndarray, " n"]) -> Iterator[Pair]:
    """Those of these pairs whose image is a file that cannot be found. Of a part whose images are in a shard, an
    archive or a table one pair is read, and none of a shard that would be fetched."""
    shards, parts = pairs.shard_of_part, pairs.parts_of(numbers)
    of_files: dict[int, bool] = {}
    for number, part in zip(map(int, numbers), map(int, parts), strict=True):
        if part not in of_files:
            of_files[part] = shards[part] is None and isinstance(pairs[number].image, FileSource)
        if of_files[part] and (pair := pairs[number]).image.version == FileSource.MISSING:
            yield pair


def _count_images(pairs: Iterable[Pair]) -> int:
    """Each image of a group once, however many rows name it."""
    return len({(pair.group, pair.image.name) for pair in pairs})
