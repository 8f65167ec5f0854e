"""Two models compared on the same queries: paired bootstrap of the difference, McNemar's exact test for accuracies.

Input: the scored queries of both models on one task. Output: a ``Comparison`` for each row and metric, and a plain
sentence about the primary one. Note: queries are matched by id. The draws of groups are the same for both models, so
the interval is that of the difference, and may exclude 0 though the intervals of the models overlap. p-values are of
single metrics, not corrected for how many are looked at; medians of ranks have none and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.evaluation.bootstrap import ConfidenceInterval, percentile_intervals
from clasp.evaluation.name_checks import quote_first
from clasp.evaluation.query_scores import QueryScores
from clasp.evaluation.tasks import EvaluationTask, ScoredQueries
from clasp.types import UserError

COMPARISON_RESAMPLES = 10_000
"""Bootstrap resamples: the smallest p is 2 / 10,001"""
_SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class McNemar:
    """McNemar's exact test (1947; binomial, two-sided) of paired right and wrong answers.

    ``only_first`` and ``only_second``: queries that only one of the models answers right. Under the null hypothesis
    each of these is either's with probability 1/2.
    """

    only_first: int
    only_second: int

    @property
    def p_value(self) -> float:
        """Probability of a split at least as uneven: twice the binomial tail, at most 1."""
        n, least = self.only_first + self.only_second, min(self.only_first, self.only_second)
        tail = sum(math.comb(n, k) for k in range(least + 1))
        return min(1.0, 2 * tail / 2**n)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of one row of results, of both models.

    ``difference`` is ``first - second``; ``interval`` its 95 % interval, of the paired bootstrap over groups. ``test``:
    ``mcnemar`` where the values of single queries are right or wrong and every query is a group of its own, else
    ``bootstrap``: twice the smaller share of replicates on either side of 0, the percentile interval's level at 0.
    """

    task: str
    language: str
    metric: str
    first: float
    second: float
    difference: float
    interval: ConfidenceInterval
    p_value: float
    test: Literal["mcnemar", "bootstrap"]
    only_first: int | None
    only_second: int | None
    n: int

    @property
    def significant(self) -> bool:
        """p < 0.05, and the interval excludes 0."""
        return self.p_value < _SIGNIFICANCE_LEVEL and not self.interval.low <= 0 <= self.interval.high

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_scored(
    task: EvaluationTask,
    first: Sequence[ScoredQueries],
    second: Sequence[ScoredQueries],
    *,
    resamples: int = COMPARISON_RESAMPLES,
) -> list[Comparison]:
    """A comparison for each row of ``task`` and each of its metrics that is a mean.

    Raises ``UserError`` where the models were not scored on the same queries.
    """
    both = [_in_order(first), _in_order(second)]
    _require_same_queries(*both)
    tests = {
        (each.language, one.direction, name): test
        for each, other in zip(*both, strict=True)
        for one, against in zip(each.scores, other.scores, strict=True)
        for name, test in _mcnemar_tests(one, against)
    }
    comparisons = []
    rows = (task.partial_results(scored, resamples) for scored in both)
    for one, other in zip(*rows, strict=True):
        assert (one.language, one.direction) == (other.language, other.direction)
        for name, replicates in one.replicates.items():
            change = replicates - other.replicates[name]
            test = tests.get((one.language, one.direction, name))
            comparisons.append(
                Comparison(
                    task=f"{task.name}/{one.direction}" if one.direction else task.name,
                    language=one.language,
                    metric=name,
                    first=one.metrics[name],
                    second=other.metrics[name],
                    difference=one.metrics[name] - other.metrics[name],
                    interval=percentile_intervals(change[:, None])[0],
                    p_value=bootstrap_p_value(change) if test is None else test.p_value,
                    test="bootstrap" if test is None else "mcnemar",
                    only_first=None if test is None else test.only_first,
                    only_second=None if test is None else test.only_second,
                    n=one.n,
                )
            )
    return comparisons


def bootstrap_p_value(change: Float[Tensor, " resamples"]) -> float:
    """Two-sided level at which the percentile interval of the replicates ends at 0, at most 1.

    Efron and Tibshirani, 1993, section 15.4 (achieved significance level), with one added to counts so that it is never
    0 (Davison and Hinkley, 1997, section 4.2).
    """
    change = change[~change.isnan()]
    below, above = int((change <= 0).sum()), int((change >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(change) + 1))


def primary_comparison(task: EvaluationTask, comparisons: Sequence[Comparison]) -> Comparison:
    """The comparison of the task's primary metric."""
    for each in comparisons:
        direction = each.task.removeprefix(task.name).removeprefix("/")
        if "/".join(filter(None, (each.language, direction, each.metric))) == task.primary:
            return each
    raise AssertionError(f"no comparison of {task.primary!r}")


def _in_order(scored: Sequence[ScoredQueries]) -> list[ScoredQueries]:
    return [
        ScoredQueries(each.language, [one.sorted_by_id() for one in each.scores], each.shared_seconds, each.own_seconds)
        for each in scored
    ]


def _require_same_queries(first: Sequence[ScoredQueries], second: Sequence[ScoredQueries]) -> None:
    assert [each.language for each in first] == [each.language for each in second]
    for each, other in zip(first, second, strict=True):
        for one, against in zip(each.scores, other.scores, strict=True):
            if odd := sorted(set(one.ids) ^ set(against.ids)):
                most = max(len(one.ids), len(against.ids))
                raise UserError(
                    f"the models were not scored on the same queries: {len(odd)} of {most} are of one model only: "
                    f"{quote_first(odd, 3)}"
                )
            assert one.groups == against.groups


def _mcnemar_tests(first: QueryScores, second: QueryScores) -> Iterator[tuple[str, McNemar]]:
    """For each mean of independent right and wrong answers."""
    if len(set(first.groups)) < len(first.groups):
        return
    for name, mean in first.means.items():
        values = torch.stack([mean.values.double(), second.means[name].values.double()])
        if mean.cells is None and bool(((values == 0) | (values == 1)).all()):
            one, other = values.bool()
            yield name, McNemar(int((one & ~other).sum()), int((other & ~one).sum()))
