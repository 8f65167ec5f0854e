"""The order in which shards on object storage are read: a few of them at a time, the next ones fetched meanwhile.

Input: pairs. Output: ``ShardWindows`` for those whose shards do not all fit in the stage, and the order of an epoch.
Note: the shards are shuffled and cut into windows of half the stage; samples are shuffled within a window, so each
shard is fetched once an epoch. The order depends on the seed, the epoch, the sizes of the shards and ``data.stage_gb``
only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from clasp.data.pair_sequence import Pairs
from clasp.data.shard_stage import StagedShard, fetch_in_background


@dataclass(frozen=True, eq=False)
class ShardWindows:
    """The shards of pairs, and how many of them are read at a time."""

    shards: tuple[StagedShard, ...]
    part: Int[np.ndarray, " pairs"]
    """The number of the shard of each pair."""
    per_window: int

    @classmethod
    def of(cls, pairs: Pairs) -> ShardWindows | None:
        """``None`` where pairs are shuffled without regard to shards: these are on this disk, or fit in the stage."""
        shards = pairs.shards
        sizes = [shard.remote.size for shard in shards]
        if not shards or sum(sizes) <= (most := shards[0].stage.max_bytes):
            return None
        return cls(shards, pairs.parts_of(np.arange(len(pairs))).astype(np.int32), max(1, most // (2 * max(sizes))))

    def number(self, random: Int[np.ndarray, " shards"]) -> Int[np.ndarray, " shards"]:
        """The window of each shard, when they are shuffled by sorting random numbers."""
        rank = np.empty(len(random), np.int64)
        rank[np.argsort(random, kind="stable")] = np.arange(len(random))
        return rank // self.per_window

    def fetch_ahead(self, windows: Int[np.ndarray, " shards"], number: int) -> None:
        """Begin to fetch the shards of a window, and then those of the next, in the background."""
        following = [np.flatnonzero(windows == each) for each in (number, number + 1)]
        fetch_in_background([self.shards[shard] for shard in np.concatenate(following)])


def fetch_following(pairs: Pairs, number: int) -> None:
    """Begin to fetch the shard after that of pair ``number`` in the background, if there is one."""
    if pairs.shards:
        following = int(pairs.parts_of(np.array([number]))[0]) + 1
        fetch_in_background(pairs.shards[following : following + 1])
