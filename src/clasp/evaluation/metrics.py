"""Rank counts of the first positive among all gallery items, and the metrics computed from them.

Input: embeddings and an integer label for each query and each gallery item; equal labels are positives of each other.
Output: ``rank_counts``, three counts per query, and from them recall@k, ranks and accuracies. Pure; scores are in
memory for one chunk of queries only. Note: ties are broken at random. Every metric is the expected value under a random
order of the tied items, with several positives too, so that a model with collapsed embeddings scores exactly the chance
level (counting strictly better scores only would give it a perfect score).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.types import UserError

# Two scores are tied when they differ by less than this fraction of the largest score that the norms allow: eight
# units in the last place of float32, just above what rounding does to the score of one and the same pair.
TIE_TOLERANCE = 1e-6

_MAX_GALLERY_SIZE = 1 << 24  # above it, a count held in float32 is no longer exact


class RankCounts(NamedTuple):
    """For each query: number of items above its best positive, and of items tied with it (itself included)."""

    better: Int[Tensor, " q"]
    tied_negatives: Int[Tensor, " q"]
    tied_positives: Int[Tensor, " q"]


@torch.no_grad()
def rank_counts(
    queries: Float[Tensor, "q E"],
    gallery: Float[Tensor, "n E"],
    query_labels: Int[Tensor, " q"],
    gallery_labels: Int[Tensor, " n"],
    *,
    scores_at_once: int = 1 << 22,
) -> RankCounts:
    """Compare every query with the whole gallery by dot product.

    Memory beyond the arguments: twice ``scores_at_once`` numbers, and the positives of as many scores. Time: one
    matrix product and two counts. Half-precision embeddings are compared in float32; float64 stays float64.

    Raises:
        UserError: an embedding that is not finite (or so large that scores overflow); a query without any positive;
            no queries.
    """
    precise = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
    queries, gallery = queries.to(precise), gallery.to(precise)
    tie = TIE_TOLERANCE * _score_bounds(queries, gallery)
    places = _Positives(query_labels, gallery_labels)
    chunks = []
    step = max(1, scores_at_once // len(gallery))
    buffers = queries.new_empty(2, min(step, len(queries)), len(gallery))
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            scores, room = buffers[:, : len(queries[rows])]
            torch.mm(queries[rows], gallery.T, out=scores)
            chunks.append(_count_ranks(scores, tie[rows], *places.among(scores, rows), room))
    return RankCounts(*(torch.cat(column) for column in zip(*chunks, strict=True)))


class _Positives:
    """The positives of each query, as stretches of the gallery sorted by label: no query x gallery mask is needed."""

    def __init__(self, query_labels: Int[Tensor, " q"], gallery_labels: Int[Tensor, " n"]) -> None:
        ordered, self.order = gallery_labels.sort(stable=True)
        self.first = torch.searchsorted(ordered, query_labels)
        self.count = torch.searchsorted(ordered, query_labels, right=True) - self.first
        if (lacking := self.count == 0).any():
            label = int(query_labels[lacking][0])
            raise UserError(f"{int(lacking.sum())} of {len(lacking)} queries (first: label {label}) have no positive")

    def among(
        self, scores: Float[Tensor, "rows n"], rows: slice
    ) -> tuple[Int[Tensor, " positives"], Float[Tensor, " positives"]]:
        """For each positive of these queries: the row it belongs to, and its score."""
        count = self.count[rows]
        row = torch.arange(len(count), device=count.device).repeat_interleave(count)
        within = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        return row, scores[row, self.order[self.first[rows][row] + within]]


def _count_ranks(
    scores: Float[Tensor, "rows n"],
    tie: Float[Tensor, " rows"],
    row: Int[Tensor, " positives"],
    positive: Float[Tensor, " positives"],
    buffer: Float[Tensor, "rows n"],
) -> RankCounts:
    best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, row, positive, "amax")
    low = best - tie

    # Comparing into floats and summing those takes a fifth of the time of summing booleans (CPU, torch 2.13).
    better = torch.gt(scores, (best + tie)[:, None], out=buffer).sum(dim=1).long()
    tied = torch.ge(scores, low[:, None], out=buffer).sum(dim=1).long() - better
    tied_positives = torch.zeros_like(tied).index_add(0, row, (positive >= low[row]).long())
    return RankCounts(better, tied - tied_positives, tied_positives)


def _score_bounds(queries: Float[Tensor, "q E"], gallery: Float[Tensor, "n E"]) -> Float[Tensor, " q"]:
    """The bound |query| max |item| on each query's scores; where it is finite, no score is NaN or overflows."""
    if not len(queries) or not 0 < len(gallery) <= _MAX_GALLERY_SIZE:
        raise UserError(f"cannot rank {len(queries)} queries in a gallery of {len(gallery)} (1 to {_MAX_GALLERY_SIZE})")
    largest = queries.norm(dim=1) * gallery.norm(dim=1).max()
    if not largest.isfinite().all():
        broken = [
            f"{int((~x.norm(dim=1).isfinite()).sum())} of {len(x)} {what}"
            for x, what in ((queries, "queries"), (gallery, "gallery items"))
        ]
        raise UserError(f"embeddings must be finite to be ranked: not so in {broken[0]} and {broken[1]}")
    return largest


def first_ranked(
    queries: Float[Tensor, "q E"], gallery: Float[Tensor, "n E"], *, scores_at_once: int = 1 << 22
) -> list[int]:
    """For each query the gallery row with the highest dot product; of equal ones the first."""
    step = max(1, scores_at_once // len(gallery))
    return [int(row) for some in queries.split(step) for row in (some @ gallery.T).argmax(dim=1)]


def chance_rank_counts(query_labels: Int[Tensor, " q"], gallery_labels: Int[Tensor, " n"]) -> RankCounts:
    """The rank counts of the chance level: all items tied, as for collapsed embeddings."""
    count = _Positives(query_labels, gallery_labels).count
    return RankCounts(torch.zeros_like(count), len(gallery_labels) - count, count)


def hit_at_k(counts: RankCounts, k: int) -> Float[Tensor, " q"]:
    """For each query, the probability that a positive is among the first ``k``; 0 or 1 where nothing is tied.

    A block of tied items has max(0, k - better) places in the top k; that all of them go to negatives has the
    hypergeometric probability C(negatives, places) / C(negatives + positives, places). The mean over queries is
    recall@k as CLIP papers mean it (one positive suffices); with one gallery vector a class, top-k accuracy.
    """
    if k < 1:
        raise UserError(f"k is {k}; it must be at least 1")
    better, negatives, positives = (count.double() for count in counts)
    missed = torch.ones_like(better)
    for place in range(k):
        to_negative = (negatives - place).clamp(min=0) / (negatives + positives - place).clamp(min=1)
        missed *= torch.where(better + place < k, to_negative, 1.0)
    return 1 - missed


def expected_ranks(counts: RankCounts) -> Float[Tensor, " q"]:
    """Expected rank of the first positive of each query, from 1.

    In a random order of n tied negatives and p positives, n / (p + 1) negatives come before the first positive.
    """
    return counts.better + 1 + counts.tied_negatives.double() / (counts.tied_positives + 1)


def median_rank(counts: RankCounts) -> float:
    """Median of the expected ranks; of an even number of queries, the mean of the middle two."""
    return expected_ranks(counts).quantile(0.5).item()


def mean_per_class(values: Float[Tensor, " q"], classes: Int[Tensor, " q"]) -> float:
    """Mean over the classes that occur of the mean value in the class: small classes count as much as large ones."""
    _, which, count = classes.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(count), dtype=torch.float64, device=which.device).index_add(0, which, values.double())
    return (sums / count).mean().item()
