"""A result: one line of ``results.jsonl``, and its partial form with bootstrap replicates.

Input: metrics and their replicates. Output: ``EvaluationResult`` with 95 % intervals. Note: replicates are kept until
the end, so that a mean over results (both directions, a set of languages) has its own interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.data.atomic_files import with_checksum, without_checksum
from clasp.evaluation.bootstrap import ConfidenceInterval, percentile_intervals


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """One line of ``results.jsonl``.

    ``task`` is the task's name and, for a direction of retrieval, that direction (``retrieval/image_to_text``);
    without one, a retrieval row is the mean of both. ``language`` is empty where there is none, ``macro:SET`` for the
    mean over a set of languages. ``metrics`` and ``chance`` (the chance level) are fractions, ranks count from 1.
    ``n``: number of queries. ``interval``: 95 %, for all but medians. ``seconds``: wall time of embedding the images
    and of this row; what rows have in common counts in each. ``options``: those of the task but ``data``, defaults
    included; ``None`` in rows of clasp 0.1, which did not record them. ``evaluation_id``: the same for all
    evaluations of one task with the same options on the same pairs (``evaluation.identity``); empty where it was not
    recorded. ``dataclasses.asdict`` of it is JSON.
    """

    task: str
    data: str
    language: str
    metrics: dict[str, float]
    chance: dict[str, float]
    n: int
    interval: dict[str, ConfidenceInterval]
    seconds: float
    options: Mapping[str, str] | None = None
    evaluation_id: str = ""

    def to_row(self) -> dict[str, Any]:
        """The line, with its checksum."""
        return with_checksum(asdict(self))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> EvaluationResult:
        """The inverse. Raises ``TypeError``, ``KeyError``, ``ValueError`` or ``AttributeError`` for another line."""
        interval = {name: ConfidenceInterval(*ends) for name, ends in row["interval"].items()}
        return cls(**{**without_checksum(row), "interval": interval})


@dataclass(frozen=True, slots=True)
class PartialResult:
    """A result with bootstrap replicates instead of intervals. ``direction`` is empty where a task has none."""

    language: str
    direction: str
    metrics: dict[str, float]
    chance: dict[str, float]
    n: int
    replicates: dict[str, Float[Tensor, " resamples"]]
    shared_seconds: float
    own_seconds: float

    def finish(self, task: str, data: str) -> EvaluationResult:
        """The final row, with intervals in place of replicates."""
        columns = list(self.replicates.values())
        intervals = percentile_intervals(torch.stack(columns, dim=1)) if columns else []
        return EvaluationResult(
            task=f"{task}/{self.direction}" if self.direction else task,
            data=data,
            language=self.language,
            metrics=self.metrics,
            chance=self.chance,
            n=self.n,
            interval=dict(zip(self.replicates, intervals, strict=True)),
            seconds=self.shared_seconds + self.own_seconds,
        )


@dataclass(frozen=True, slots=True)
class PrimaryScore:
    """The primary metric of a task, and its bootstrap replicates; those of one task are on the same draws of groups."""

    value: float
    replicates: Float[Tensor, " resamples"]

    @property
    def interval(self) -> ConfidenceInterval:
        """The 95 % interval of the metric."""
        return percentile_intervals(self.replicates[:, None])[0]

    def change_from(self, other: PrimaryScore) -> ScoreChange:
        """The change from another score of the same task: a paired bootstrap."""
        change = self.replicates - other.replicates
        interval = percentile_intervals(change[:, None])[0]
        return ScoreChange(self.value - other.value, interval, float(change[~change.isnan()].std(correction=0)))


@dataclass(frozen=True, slots=True)
class ScoreChange:
    """The change of a metric between two models, its 95 % interval and its standard error, from a paired bootstrap."""

    value: float
    interval: ConfidenceInterval
    standard_error: float


def mean_result(
    results: Sequence[PartialResult], *, language: str, direction: str, own_seconds: float
) -> PartialResult:
    """The plain mean of results that have the same metrics, replicate by replicate."""
    first, count = results[0], len(results)
    return PartialResult(
        language=language,
        direction=direction,
        metrics={name: sum(result.metrics[name] for result in results) / count for name in first.metrics},
        chance={name: sum(result.chance[name] for result in results) / count for name in first.chance},
        n=sum(result.n for result in results),
        replicates={
            name: torch.stack([result.replicates[name] for result in results]).nanmean(dim=0)
            for name in first.replicates
        },
        shared_seconds=first.shared_seconds,
        own_seconds=own_seconds,
    )
