"""How far the build of a cache file has come: which samples are done, as ranges of the order in which it reads them.

Input: the partial file, and the key that it is built for. Output: ``BuildProgress``, read again by the next build after
an interruption. Note: of several processes that fill a file each has a progress file of its own, with what was done
before they began and what it did itself; the next build, of any number of processes, reads all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from clasp.data.atomic_files import write_text_file
from clasp.data.feature_cache.partial_file import PartialFile

_Range = tuple[int, int]


@dataclass
class BuildProgress:
    """Ranges ``[first, end)`` of samples that are done, and the writer's notes."""

    done: list[_Range] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Samples that are done."""
        return sum(end - first for first, end in self.done)

    def add(self, first: int, end: int) -> None:
        """Samples ``first`` to ``end`` are done."""
        self.done = _merged([*self.done, (first, end)])

    def covers(self, ends: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of consecutive batches are wholly done; batch i ends before sample ``ends[i]``."""
        if not self.done:
            return np.zeros(len(ends), dtype=bool)
        firsts, lasts = np.array(self.done, dtype=np.int64).T
        starts = np.concatenate([[0], ends[:-1]])
        at = np.searchsorted(firsts, starts, side="right") - 1
        return (at >= 0) & (ends <= lasts[at])

    def save(self, part: PartialFile, rank: int, key: Mapping[str, Any]) -> None:
        """Write it beside the partial file."""
        write_text_file(part.progress(rank), json.dumps({"key": key, "done": self.done, "notes": self.notes}))


def read_progress(part: PartialFile, key: Mapping[str, Any]) -> BuildProgress:
    """What all processes of an earlier build of the same key had done; nothing where there was none."""
    saved: list[BuildProgress] = []
    for path in part.all_progress():
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["key"] == key:
                saved.append(
                    BuildProgress([(int(first), int(end)) for first, end in read["done"]], dict(read["notes"]))
                )
    return BuildProgress(_merged(each for one in saved for each in one.done), merge_notes([one.notes for one in saved]))


def merge_notes(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The notes of several processes: of ``skipped``, rows by the number they begin with; all else is the same."""
    merged: dict[str, Any] = {}
    for each in notes:
        merged |= each
    if "skipped" in merged:
        rows = {row[0]: row for each in notes for row in each.get("skipped", ())}
        merged["skipped"] = [rows[number] for number in sorted(rows)]
    return merged


def _merged(ranges: Iterable[_Range]) -> list[_Range]:
    """The same samples in as few ranges as there can be, in order."""
    merged: list[_Range] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged
