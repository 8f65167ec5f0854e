"""Pairs that are in memory: those of layouts whose index is a small file.

Input: a list of ``Pair``. Output: an ``OpenedSource``, with its captions checked. Note: for some ten thousand pairs;
the formats for more read their rows on demand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt64

from clasp.data.formats.ids import hash64, require_unique_ids
from clasp.data.formats.rows import CaptionCheck
from clasp.plain_types import Pair, UserError


@dataclass(frozen=True, eq=False)
class ListedPairs:
    """Pairs in memory; an ``OpenedSource``."""

    pairs: Sequence[Pair]
    root: str
    hashes: UInt64[np.ndarray, " pairs"]
    id_prefix: str = ""
    path_prefix: str = ""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int, /) -> Pair:
        pair = self.pairs[row]
        return replace(pair, id=self.id_prefix + pair.id, group=self.path_prefix + pair.group)

    def prefixed(self, id_prefix: str, path_prefix: str) -> "ListedPairs":
        return replace(self, id_prefix=id_prefix, path_prefix=path_prefix)


def check_listed_pairs(name: str, pairs: Sequence[Pair], root: str) -> ListedPairs:
    """The pairs of the source ``name``. Raises ``UserError``: none, one without a caption, one id twice."""
    if not pairs:
        raise UserError(f"{name} has no pairs")
    check = CaptionCheck(name)
    for pair in pairs:
        check.add(f"{name}: {pair.id}", pair.captions)
    check.finish()
    opened = ListedPairs(pairs, root, np.array([hash64(pair.id) for pair in pairs], np.uint64))
    require_unique_ids(name, opened)
    return opened
