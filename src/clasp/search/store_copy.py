"""Copy all entries of one store into another, and compare the two.

Input: two stores. Output: the number of entries. Note: vectors are normalised again when they are written, so one may
differ in the last bit of float32; the comparison allows that much.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from clasp.errors import counted
from clasp.plain_types import ProgressCallback, UserError
from clasp.search.engine import UpdatableStore

_AT_ONCE = 500
_SAMPLE = 200  # entries whose vectors and metadata are compared
_TOLERANCE = 1e-6


def copy_entries(source: UpdatableStore, target: UpdatableStore, progress: ProgressCallback) -> int:
    """Add every entry of ``source``, with its model, to ``target``, which has none or those of an interrupted copy.

    ``UserError`` if ``target`` holds anything else, and if what is in it afterwards differs.
    """
    _refuse_other_entries(source, target)
    target.claim(source.model, source.model_name)
    total, done = source.count(), 0
    for part in _batches(source):
        ids, meta = [name for name, _ in part], [about for _, about in part]
        target.add(ids, source.vectors(ids), meta)
        done += len(ids)
        progress(done, total)
    _verify(source, target)
    return total


def _refuse_other_entries(source: UpdatableStore, target: UpdatableStore) -> None:
    if not target.count():
        return
    known = {name for name, _ in source.scan()}
    others = [name for name, _ in target.scan() if name not in known]
    if others or target.model != source.model:
        raise UserError(f"{target!r} has entries that are not of this run, such as {others[:1]}; name an empty store")


def _verify(source: UpdatableStore, target: UpdatableStore) -> None:
    """``UserError`` unless both have the same number of entries and a random sample of them is equal."""
    if source.count() != target.count():
        raise UserError(f"{target!r} should hold {counted(source.count(), 'entry')}; what was copied from is unchanged")
    names = [name for name, _ in source.scan()]
    sample = random.Random(len(names)).sample(names, min(_SAMPLE, len(names)))
    for name, before, after in zip(sample, source.metadata(sample), target.metadata(sample), strict=True):
        if before != after:
            raise UserError(f"{target!r} has other metadata for {name!r}; what was copied from is unchanged")
    furthest = float(np.abs(source.vectors(sample) - target.vectors(sample)).max())
    if not furthest <= _TOLERANCE:
        raise UserError(f"{target!r} has vectors that differ by {furthest:.1g}; what was copied from is unchanged")


def _batches(store: UpdatableStore) -> Iterator[list[tuple[str, Mapping[str, Any]]]]:
    part: list[tuple[str, Mapping[str, Any]]] = []
    for entry in store.scan():
        part.append(entry)
        if len(part) == _AT_ONCE:
            yield part
            part = []
    if part:
        yield part
