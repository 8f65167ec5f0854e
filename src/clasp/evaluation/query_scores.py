"""The scores of all queries of a task in one direction, the metrics that are their means, and bootstrap replicates.

Input: a value for each query and its group. Output: metrics by name (``QueryScores.metrics``), and the same metrics
on resampled groups (``resample_scores``). Note: a metric is stored as the per-query values it is the mean of,
so that means and intervals over any part of the queries can be computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.evaluation import metrics
from clasp.evaluation.bootstrap import GroupedScores, bootstrap_replicates, number_groups


@dataclass(frozen=True, slots=True)
class MeanMetric:
    """A metric that is a mean: over queries or, where ``cells`` are given, over the means of the cells."""

    values: Float[Tensor, " q"]
    cells: Int[Tensor, " q"] | None = None

    def value(self) -> float:
        """The metric: a fraction between 0 and 1."""
        if self.cells is None:
            return self.values.mean().item()
        return metrics.mean_per_class(self.values, self.cells)


@dataclass(frozen=True, slots=True)
class QueryScores:
    """The scores of all queries, in one direction (``direction``; empty where there is only one).

    ``groups`` holds the cluster of each query: the unit that is resampled for intervals. ``chance`` is the
    chance level of each metric.
    """

    direction: str
    groups: tuple[str, ...]
    means: Mapping[str, MeanMetric]
    medians: Mapping[str, float]
    chance: Mapping[str, float]

    def metrics(self) -> dict[str, float]:
        """Every metric by name."""
        return {name: mean.value() for name, mean in self.means.items()} | dict(self.medians)


def resample_scores(
    scores: Sequence[QueryScores], resamples: int, seed: int
) -> list[dict[str, Float[Tensor, " resamples"]]]:
    """For each of ``scores`` the replicates of its means, all on the same draws of groups; none for 0 resamples."""
    made: list[dict[str, Tensor]] = [{} for _ in scores]
    if not resamples:
        return made
    numbers, group_count = number_groups([one.groups for one in scores])
    samples, whose = [], []
    for one, groups, into in zip(scores, numbers, made, strict=True):
        plain = tuple(name for name, mean in one.means.items() if mean.cells is None)
        for names in (plain, *((name,) for name in one.means if name not in plain)):
            values = torch.stack([one.means[name].values for name in names], dim=1)
            samples.append(GroupedScores(values, groups, one.means[names[0]].cells))
            whose.append((into, names))
    drawn = bootstrap_replicates(samples, group_count=group_count, resamples=resamples, seed=seed)
    for (into, names), columns in zip(whose, drawn, strict=True):
        into.update(zip(names, columns.T, strict=True))
    return made
