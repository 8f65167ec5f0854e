"""Sampling uncertainty of a metric: the percentile bootstrap over groups.

Input: a value for each query and the group (cluster) it belongs to. Output: the metric recomputed on resampled groups
(``bootstrap_replicates``) and the interval between two of their percentiles. Note: whole groups are drawn, since
queries that share an image are not independent; and several samples are resampled by the same draws, so that the
replicates of several languages may be averaged into those of their macro mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

DRAWS_PER_CHUNK = 1 << 20  # groups drawn before they are used, over all resamples of a chunk; bounds the memory


class ConfidenceInterval(NamedTuple):
    """The ends of a confidence interval, in the unit of the metric."""

    low: float
    high: float


class GroupedScores(NamedTuple):
    """The per-query values that some metrics are means of.

    ``values``: a column per metric; the metric is the mean of its column. ``groups``: the group of each query, from 0.
    ``classes``: where given, the metrics are means over cells of the mean in the cell (mean accuracy per class).
    """

    values: Float[Tensor, "q M"]
    groups: Int[Tensor, " q"]
    classes: Int[Tensor, " q"] | None = None


def bootstrap_replicates(
    samples: Sequence[GroupedScores], *, group_count: int, resamples: int = 1000, seed: int = 0
) -> list[Float[Tensor, "resamples M"]]:
    """The metrics of each sample on resampled data: ``group_count`` groups drawn with replacement, ``resamples`` times.

    The draws are common to all samples: row r of every result uses the same groups. Groups of which a sample has
    no query may be drawn too, as when a language names only some of the images. A cell that a resample misses is
    left out of the mean of that resample; with no cell left it is NaN. Time: resamples x (groups + queries).
    """
    sparse = [_sums_by_class(sample, group_count) for sample in samples]
    chunks = [
        [_mean_over_classes(weights, cells) for cells in sparse]
        for weights in _resampling_weights(group_count, resamples, seed)
    ]
    return [torch.cat(of_sample) for of_sample in zip(*chunks, strict=True)]


def number_groups(groups: Sequence[Sequence[str]]) -> tuple[list[Int[Tensor, " _"]], int]:
    """The groups of several samples as numbers from 0, and how many groups there are in all of them together.

    Numbers follow the sorted names, so that intervals do not depend on the order of reading.
    """
    number = {group: place for place, group in enumerate(sorted({group for each in groups for group in each}))}
    return [torch.tensor([number[group] for group in each]) for each in groups], len(number)


def _sums_by_class(
    sample: GroupedScores, group_count: int
) -> list[tuple[Int[Tensor, " _"], Float[Tensor, "_ columns"]]]:
    """For each cell, its groups, and per group the sums of the values and (last column) the number of queries."""
    cells = torch.zeros_like(sample.groups) if sample.classes is None else sample.classes
    pairs, which, count = (cells * group_count + sample.groups).unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(pairs), sample.values.shape[1], dtype=torch.float64)
    sums = torch.cat([sums.index_add(0, which, sample.values.double()), count.double()[:, None]], dim=1)
    widths = torch.div(pairs, group_count, rounding_mode="floor").unique_consecutive(return_counts=True)[1].tolist()
    return list(zip((pairs % group_count).split(widths), sums.split(widths), strict=True))


def _mean_over_classes(
    weights: Float[Tensor, "rows universe"], class_sums: list[tuple[Int[Tensor, " _"], Float[Tensor, "_ columns"]]]
) -> Float[Tensor, "rows M"]:
    total, seen = torch.zeros(()), torch.zeros(())
    for groups, sums in class_sums:
        drawn = weights[:, groups] @ sums
        queries = drawn[:, -1:]
        total = total + drawn[:, :-1] / queries.clamp(min=1)
        seen = seen + (queries > 0)
    return total / seen


def _resampling_weights(group_count: int, resamples: int, seed: int) -> Iterator[Float[Tensor, "rows universe"]]:
    """How often each group was drawn, a row a resample, in chunks."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, DRAWS_PER_CHUNK // group_count)
    for start in range(0, resamples, step):
        drawn = torch.randint(group_count, (min(step, resamples - start), group_count), generator=generator)
        yield torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def percentile_intervals(replicates: Float[Tensor, "resamples M"], level: float = 0.95) -> list[ConfidenceInterval]:
    """The central part of the replicates that holds the fraction ``level`` of them, one interval a metric.

    Percentile intervals are somewhat too narrow where there are few groups: with 10 groups by about a fifth.
    """
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return [ConfidenceInterval(*pair) for pair in replicates.nanquantile(ends, dim=0).T.tolist()]
