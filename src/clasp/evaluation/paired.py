"""The same questions put to two states of a tower, before and after: their means, and how far apart they are.

In: what each query scored before and after (``PairedScores``). Out: rows of results whose metrics are ``before``,
``after`` and ``change``. Unusual: the change has an interval of its own. Both states answered the same queries, so the
same draws of groups are taken of both; the two intervals may overlap where the change is certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.evaluation.bootstrap import ConfidenceInterval, GroupedScores, bootstrap_replicates, percentile_intervals
from clasp.evaluation.tasks import EvaluationResult

_STATES = ("before", "after", "change")
_LABEL_REPLACEMENTS = {
    "recall@": "R@",
    "image_knn": "image: k-NN",
    "image_linear": "image: linear probe",
    "/": ", ",
    "_": " ",
}


@dataclass(frozen=True, kw_only=True)
class PairedScores:
    """One probe on one set of queries: what each of them scored in both states, between 0 and 1.

    ``groups`` holds the group of each query, the unit that is resampled; ``chance`` is what guessing scores.
    """

    task: str
    language: str = ""
    groups: tuple[str, ...]
    before: Float[Tensor, " q"]
    after: Float[Tensor, " q"]
    chance: float
    seconds: float = 0.0


def paired_results(
    data: str, paired_scores: Sequence[PairedScores], *, resamples: int = 1000, seed: int = 0
) -> list[EvaluationResult]:
    """A row for each comparison, task by task; after several languages of a task, their mean, ``macro:SET``.

    ``chance`` is that of ``before`` and ``after``; the change that guessing shows is 0.
    """
    columns = [torch.stack([c.before, c.after, c.after - c.before], dim=1) for c in paired_scores]
    drawn = _resampled(columns, [c.groups for c in paired_scores], resamples, seed)
    rows: list[EvaluationResult] = []
    for task in dict.fromkeys(c.task for c in paired_scores):
        of_task = [number for number, c in enumerate(paired_scores) if c.task == task]
        for number in of_task:
            rows.append(_paired_result(data, [paired_scores[number]], [columns[number]], [drawn[number]]))
        named = [number for number in of_task if paired_scores[number].language]
        if len(named) > 1:
            members, values = [paired_scores[n] for n in named], [columns[n] for n in named]
            rows.append(
                _paired_result(
                    data, members, values, [drawn[n] for n in named], language=f"macro:{_language_set(task)}"
                )
            )
    return rows


def bootstrap_mean(
    samples: Sequence[tuple[Float[Tensor, " _"], tuple[str, ...]]], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, ConfidenceInterval]:
    """The mean over parts of the mean of each part's values, and its 95 % interval over the groups of all of them."""
    columns = [values[:, None] for values, _ in samples]
    drawn = _resampled(columns, [groups for _, groups in samples], resamples, seed)
    mean = sum(column.mean().item() for column in columns) / len(columns)
    return mean, percentile_intervals(torch.stack(drawn).nanmean(dim=0))[0]


def result_label(result: EvaluationResult) -> str:
    """What a row is about, for a table or a figure: ``text R@1, never trained: zu``."""
    task = result.task.partition("/")[2]
    for written, said in _LABEL_REPLACEMENTS.items():
        task = task.replace(written, said)
    if result.language.startswith("macro:"):
        return f"{task}: mean"
    return f"{task}: {result.language}" if result.language else task


def _paired_result(
    data: str,
    paired_scores: Sequence[PairedScores],
    columns: Sequence[Float[Tensor, "_ 3"]],
    replicates: Sequence[Float[Tensor, "resamples 3"]],
    language: str | None = None,
) -> EvaluationResult:
    first, count = paired_scores[0], len(paired_scores)
    values = torch.stack([column.double().mean(dim=0) for column in columns]).mean(dim=0)
    intervals = percentile_intervals(torch.stack(list(replicates)).nanmean(dim=0))
    chance = sum(c.chance for c in paired_scores) / count
    return EvaluationResult(
        task=first.task,
        data=data,
        language=first.language if language is None else language,
        metrics=dict(zip(_STATES, values.tolist(), strict=True)),
        chance={"before": chance, "after": chance, "change": 0.0},
        n=sum(len(c.groups) for c in paired_scores),
        interval=dict(zip(_STATES, intervals, strict=True)),
        seconds=sum(c.seconds for c in paired_scores),
    )


def _resampled(
    columns: Sequence[Float[Tensor, "_ M"]], groups: Sequence[tuple[str, ...]], resamples: int, seed: int
) -> list[Float[Tensor, "resamples M"]]:
    number = {group: place for place, group in enumerate(sorted({g for each in groups for g in each}))}
    samples = [
        GroupedScores(values, _group_numbers(each, number)) for values, each in zip(columns, groups, strict=True)
    ]
    return bootstrap_replicates(samples, group_count=len(number), resamples=resamples, seed=seed)


def _group_numbers(groups: Iterable[str], number: dict[str, int]) -> Int[Tensor, " q"]:
    return torch.tensor([number[group] for group in groups])


def _language_set(task: str) -> str:
    """The set of languages that a task is about is its last part, where it has three; else all there are."""
    parts = task.split("/")
    return parts[2] if len(parts) > 2 else "all"
