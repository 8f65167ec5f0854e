"""The same queries scored in two states of a tower, before and after: their means, and the change between them.

Input: per-query scores before and after (``PairedScores``). Output: rows of results whose metrics are ``before``,
``after`` and ``change``. Note: the interval of the change is from a paired bootstrap: the same draws of groups are used
for both states, so the intervals of the states may overlap where the change is significant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.evaluation.bootstrap import (
    ConfidenceInterval,
    GroupedScores,
    bootstrap_replicates,
    number_groups,
    percentile_intervals,
)
from clasp.evaluation.language_sets import ALL_LANGUAGES, TrainingStatus, macro_results
from clasp.evaluation.results import EvaluationResult, PartialResult

_STATES = ("before", "after", "change")


@dataclass(frozen=True, kw_only=True)
class PairedScores:
    """One probe on one set of queries: the score of each query in both states, between 0 and 1.

    ``groups`` holds the group of each query, the unit that is resampled; ``chance`` is the chance level.
    ``language_set`` is the set that ``language`` belongs to.
    """

    probe: str
    language: str = ""
    language_set: TrainingStatus = ""
    groups: tuple[str, ...]
    before: Float[Tensor, " q"]
    after: Float[Tensor, " q"]
    chance: float
    seconds: float = 0.0

    @property
    def task(self) -> str:
        """The task of its row: the probe, and the set of languages where there is one."""
        return "/".join(filter(None, (self.probe, self.language_set)))


def paired_results(
    data: str, paired_scores: Sequence[PairedScores], *, resamples: int = 1000, seed: int = 0
) -> list[EvaluationResult]:
    """A row for each comparison, task by task; after several languages of a task, their mean, ``macro:SET``.

    ``chance`` is the chance level of ``before`` and ``after``; that of the change is 0.
    """
    columns = [torch.stack([c.before, c.after, c.after - c.before], dim=1) for c in paired_scores]
    drawn = _resample(columns, [c.groups for c in paired_scores], resamples, seed)
    by_task: dict[str, list[PartialResult]] = {}
    sets: dict[str, str] = {}
    for scores, values, replicates in zip(paired_scores, columns, drawn, strict=True):
        by_task.setdefault(scores.task, []).append(_paired_result(scores, values, replicates))
        sets[scores.task] = scores.language_set or ALL_LANGUAGES
    rows: list[EvaluationResult] = []
    for task, results in by_task.items():
        languages = [result.language for result in results if result.language]
        macros = macro_results(results, {sets[task]: languages} if len(languages) > 1 else {})
        rows += [result.finish(task, data) for result in (*results, *macros)]
    return rows


def bootstrap_mean(
    samples: Sequence[tuple[Float[Tensor, " _"], tuple[str, ...]]], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, ConfidenceInterval]:
    """The mean over parts of the mean of each part's values, and its 95 % interval over the groups of all of them."""
    columns = [values[:, None] for values, _ in samples]
    drawn = _resample(columns, [groups for _, groups in samples], resamples, seed)
    mean = sum(column.mean().item() for column in columns) / len(columns)
    return mean, percentile_intervals(torch.stack(drawn).nanmean(dim=0))[0]


def _paired_result(
    scores: PairedScores, values: Float[Tensor, "q 3"], replicates: Float[Tensor, "resamples 3"]
) -> PartialResult:
    return PartialResult(
        language=scores.language,
        direction="",
        metrics=dict(zip(_STATES, values.double().mean(dim=0).tolist(), strict=True)),
        chance={"before": scores.chance, "after": scores.chance, "change": 0.0},
        n=len(scores.groups),
        replicates=dict(zip(_STATES, replicates.T, strict=True)),
        shared_seconds=0.0,
        own_seconds=scores.seconds,
    )


def _resample(
    columns: Sequence[Float[Tensor, "_ M"]], groups: Sequence[tuple[str, ...]], resamples: int, seed: int
) -> list[Float[Tensor, "resamples M"]]:
    numbers, group_count = number_groups(groups)
    samples = [GroupedScores(values, each) for values, each in zip(columns, numbers, strict=True)]
    return bootstrap_replicates(samples, group_count=group_count, resamples=resamples, seed=seed)
