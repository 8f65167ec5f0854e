"""The scores of all queries of a task in one direction, the metrics that are their means, and bootstrap replicates.

Input: a value for each query, its id and its group. Output: metrics by name (``QueryScores.metrics``), the same metrics
on resampled groups (``resample_scores``), and a row for each query (``prediction_rows``). Note: a metric is stored as
the per-query values it is the mean of, so that means and intervals over any part of the queries can be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    ``ids`` are those of the queries; ``groups`` holds the cluster of each: the unit that is resampled for intervals.
    ``expected`` is the right answer of each query (a class, or a group), and ``predict`` computes the answer that is
    ranked first (a class, or the id of an item; of tied ones the first), where there is one answer. ``ranks`` are those
    of the first right answer, from 1, where answers are ranked (zero-shot classification and retrieval): among ties the
    expected rank, such as 1.5. ``chance`` is the chance level of each metric.
    """

    direction: str
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    means: Mapping[str, MeanMetric]
    medians: Mapping[str, float]
    chance: Mapping[str, float]
    expected: tuple[str, ...]
    predict: Callable[[], list[str]] | None = None
    ranks: Float[Tensor, " q"] | None = None

    def metrics(self) -> dict[str, float]:
        """Every metric by name."""
        return {name: mean.value() for name, mean in self.means.items()} | dict(self.medians)

    def prediction_rows(self) -> list[dict[str, Any]]:
        """For each query its id, group, right answer, predicted answer (``None`` without ``predict``), the rank of the
        right one where there are ranks, and its values of the means over queries."""
        plain = {name: mean.values.tolist() for name, mean in self.means.items() if mean.cells is None}
        if self.ranks is not None:
            plain = {"rank": self.ranks.tolist(), **plain}
        predicted = [None] * len(self.ids) if self.predict is None else self.predict()
        columns = zip(self.ids, self.groups, self.expected, predicted, strict=True)
        return [
            {"id": id, "group": group, "expected": expected, "predicted": answer}
            | {name: values[row] for name, values in plain.items()}
            for row, (id, group, expected, answer) in enumerate(columns)
        ]

    def sorted_by_id(self) -> QueryScores:
        """The same scores in the order of the ids, whatever the order of reading was."""
        order = sorted(range(len(self.ids)), key=lambda row: self.ids[row])
        predict = self.predict

        def ordered(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(names[row] for row in order)

        means = {
            name: MeanMetric(mean.values[order], None if mean.cells is None else mean.cells[order])
            for name, mean in self.means.items()
        }
        return QueryScores(
            direction=self.direction,
            ids=ordered(self.ids),
            groups=ordered(self.groups),
            means=means,
            medians=self.medians,
            chance=self.chance,
            expected=ordered(self.expected),
            predict=None if predict is None else lambda: list(ordered(predict())),
            ranks=None if self.ranks is None else self.ranks[order],
        )


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
