"""Near-duplicates among hits: groups of images that are nearly the same, folded under the best of each.

Input: hits, best first, with the vectors of their images. Output: a ``HitGroup`` each. Two images are near-duplicates
if their bytes are equal (sha256), or the cosine of their embeddings reaches a threshold. Note: the threshold is
measured for each model and collection, since image embeddings of one model fill a wider cone than those of another: it
is the cosine that nine in ten images reach with a recompressed copy of themselves, as small as the image tower's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from clasp.plain_types import Hit

MISSED_COPIES = 0.1
"""Fraction of copies whose cosine with their original is below the threshold"""


@dataclass(frozen=True, slots=True)
class HitGroup:
    """A hit, and further hits that are near-duplicates of it."""

    hit: Hit
    duplicates: tuple[Hit, ...] = ()


def fold_near_duplicates(hits: Sequence[Hit], vectors: Float[np.ndarray, "n E"], threshold: float) -> list[HitGroup]:
    """Hits in groups, in the order of their best hits; a hit joins the first group whose best hit it resembles."""
    leaders: list[int] = []
    members: list[list[Hit]] = []
    for place, hit in enumerate(hits):
        cosines = (vectors[leaders] @ vectors[place]).tolist()
        sha256 = hit.meta["sha256"]
        same = (
            group
            for group, cosine in enumerate(cosines)
            if cosine >= threshold or hits[leaders[group]].meta["sha256"] == sha256
        )
        found = next(same, None)
        if found is None:
            leaders.append(place)
            members.append([])
        else:
            members[found].append(hit)
    return [HitGroup(hits[place], tuple(rest)) for place, rest in zip(leaders, members, strict=True)]


def duplicate_threshold(originals: Float[np.ndarray, "n E"], copies: Float[np.ndarray, "n E"]) -> float:
    """The cosine from which two images count as near-duplicates; ``copies[i]`` is of a copy of image ``i``.

    Without images it is 1: only equal embeddings are near-duplicates.
    """
    if not len(originals):
        return 1.0
    return min(1.0, float(np.quantile((originals * copies).sum(axis=1), MISSED_COPIES)))
