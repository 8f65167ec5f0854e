"""Evaluations: images plus a question (zero-shot, retrieval) or one question per language (multilingual).

In: an encoder. Out: ``results``, rows for ``results.jsonl`` with bootstrap intervals; or, called as an ``Evaluator``,
one flat dict of numbers without intervals. Unusual: images are embedded once, however many languages ask about them;
every row carries the score of guessing beside its own; the groups resampled for intervals are common to all
languages, so that a macro mean has an interval of its own. Knows protocols only: no model, no tokenizer, no files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.evaluation.bootstrap import ConfidenceInterval, GroupedScores, bootstrap_replicates, percentile_intervals
from clasp.evaluation.queries import (
    EvaluationQueries,
    ImageBatches,
    QueryScores,
    RetrievalQueries,
    ZeroShotQueries,
    embed_batches,
)
from clasp.types import Encoder, UserError

_QueriesT = TypeVar("_QueriesT", ZeroShotQueries, RetrievalQueries)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """One line of ``results.jsonl``.

    ``task`` is the task's name and, for a direction of retrieval, that direction (``retrieval/image_to_text``);
    without one, a retrieval row is the mean of both. ``language`` is empty where there is none, ``macro:SET`` for the
    mean over a set of languages. ``metrics`` and ``chance`` (what guessing scores) are fractions, ranks count from 1.
    ``n``: queries asked. ``interval``: 95 %, for all but medians. ``seconds``: wall time of embedding the images and
    answering this row; what rows have in common counts in each. ``dataclasses.asdict`` of it is JSON.
    """

    task: str
    data: str
    language: str
    metrics: dict[str, float]
    chance: dict[str, float]
    n: int
    interval: dict[str, ConfidenceInterval]
    seconds: float


@dataclass(kw_only=True)
class _SingleTask(Generic[_QueriesT]):
    """What zero-shot and retrieval have in common: one question about the images."""

    data: str
    images: ImageBatches
    queries: _QueriesT
    language: str = ""
    name: str
    primary: str
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        _check_primary(self.primary, _metric_names(self.queries))

    def results(self, encoder: Encoder) -> list[EvaluationResult]:
        """A row per direction, then one for their mean; one row where the question has no directions."""
        answered = _evaluate(encoder, self.data, self.images, {self.language: self.queries}, self.resamples, self.seed)
        return [row.finish(self.name, self.data) for row in answered]

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """The numbers by name."""
        return _flatten(_evaluate(encoder, self.data, self.images, {"": self.queries}))


@dataclass(kw_only=True)
class ZeroShotTask(_SingleTask[ZeroShotQueries]):
    """Classify images by class names alone. Numbers: ``top1``, ``top5``, ``mean_per_class``."""

    name: str = "zeroshot"
    primary: str = "top1"


@dataclass(kw_only=True)
class RetrievalTask(_SingleTask[RetrievalQueries]):
    """Find captions by image and images by caption.

    Numbers: ``recall@1``, ``@5``, ``@10``, ``mean_recall`` and ``median_rank``, under ``image_to_text/`` and
    ``text_to_image/``, and without prefix the means of both directions where both are asked.
    """

    name: str = "retrieval"
    primary: str = "mean_recall"


@dataclass(kw_only=True)
class MultilingualTask:
    """One question per language about the same images, and the macro means over named sets of languages.

    Numbers: those of the question under ``LANGUAGE/`` and ``macro:SET/``; a macro mean gives each language the same
    weight. ``sets`` maps a name to the languages in it, which must have been asked the same kind of question.
    """

    data: str
    images: ImageBatches
    queries: Mapping[str, EvaluationQueries]
    primary: str
    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    name: str = "multilingual"
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.queries:
            raise UserError(f"{self.name} on {self.data}: there is no language to ask in")
        names = [
            f"{language}/{name}" for language, question in self.queries.items() for name in _metric_names(question)
        ]
        for title, languages in self.sets.items():
            asked = self._languages(title, languages)
            kinds = {_metric_names(question) for question in asked}
            if len(kinds) > 1:
                raise UserError(f"the set {title!r} mixes questions with different metrics; ask one kind of question")
            names += [f"{_macro_name(title)}/{name}" for name in kinds.pop()]
        _check_primary(self.primary, names)

    def _languages(self, title: str, languages: Sequence[str]) -> list[EvaluationQueries]:
        if not languages or len(set(languages)) < len(languages):
            raise UserError(f"the set {title!r} must name at least one language, and each once: {list(languages)}")
        for language in languages:
            if language not in self.queries:
                raise UserError(f"the set {title!r} names {language!r}; {_nearest(language, list(self.queries))}")
        return [self.queries[language] for language in languages]

    def results(self, encoder: Encoder) -> list[EvaluationResult]:
        """The rows of every language, then those of every set."""
        rows = _evaluate(encoder, self.data, self.images, self.queries, self.resamples, self.seed)
        return [row.finish(self.name, self.data) for row in self._with_macros(rows)]

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """The numbers by name."""
        return _flatten(self._with_macros(_evaluate(encoder, self.data, self.images, self.queries)))

    def _with_macros(self, rows: list[_PartialResult]) -> list[_PartialResult]:
        macros = []
        for title, languages in self.sets.items():
            members = [row for row in rows if row.language in set(languages)]
            for part in dict.fromkeys(row.direction for row in members):
                of_part = [row for row in members if row.direction == part]
                own = sum(row.own_seconds for row in of_part)
                macros.append(_mean_result(of_part, _macro_name(title), part, own))
        return rows + macros


# --- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _PartialResult:
    """A result in the making: with its bootstrap replicates, so that means of rows have intervals too."""

    language: str
    direction: str
    metrics: dict[str, float]
    chance: dict[str, float]
    n: int
    replicates: dict[str, Float[Tensor, " resamples"]]
    shared_seconds: float
    own_seconds: float

    def finish(self, task: str, data: str) -> EvaluationResult:
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


def _evaluate(
    encoder: Encoder,
    data: str,
    images: ImageBatches,
    queries: Mapping[str, EvaluationQueries],
    resamples: int = 0,
    seed: int = 0,
) -> list[_PartialResult]:
    """Embed the images, ask in every language, then resample the groups that all languages have in common."""
    start = time.perf_counter()
    with _locate_errors(data):
        embedded = embed_batches(images(), encoder.embed_image, "image")
    shared = time.perf_counter() - start
    asked: list[tuple[str, list[QueryScores], float]] = []
    for language, question in queries.items():
        start = time.perf_counter()
        with _locate_errors(f"{data} in {language!r}" if language else data):
            answers = question.score(encoder, embedded)
        asked.append((language, answers, time.perf_counter() - start))
    made = iter(_replicates([answer for _, answers, _ in asked for answer in answers], resamples, seed))
    rows = []
    for language, answers, own in asked:
        parts = [
            _PartialResult(
                language=language,
                direction=answer.direction,
                metrics=answer.metrics(),
                chance=dict(answer.chance),
                n=len(answer.groups),
                replicates=next(made),
                shared_seconds=shared,
                own_seconds=own,
            )
            for answer in answers
        ]
        rows += parts
        if len(parts) > 1:
            rows.append(_mean_result(parts, language, "", own))
    return rows


@contextmanager
def _locate_errors(where: str) -> Iterator[None]:
    """Mistakes inside are told with the place where they were found."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _replicates(
    scores: Sequence[QueryScores], resamples: int, seed: int
) -> list[dict[str, Float[Tensor, " resamples"]]]:
    """For each answer the replicates of its means, all on the same draws of groups."""
    made: list[dict[str, Tensor]] = [{} for _ in scores]
    if not resamples:
        return made
    # Sorted, so that intervals do not depend on the order in which images were read.
    number = {group: index for index, group in enumerate(sorted({g for answer in scores for g in answer.groups}))}
    samples, whose = [], []
    for answer, into in zip(scores, made, strict=True):
        groups = torch.tensor([number[group] for group in answer.groups])
        plain = tuple(name for name, mean in answer.means.items() if mean.cells is None)
        for names in (plain, *((name,) for name in answer.means if name not in plain)):
            values = torch.stack([answer.means[name].values for name in names], dim=1)
            samples.append(GroupedScores(values, groups, answer.means[names[0]].cells))
            whose.append((into, names))
    drawn = bootstrap_replicates(samples, group_count=len(number), resamples=resamples, seed=seed)
    for (into, names), columns in zip(whose, drawn, strict=True):
        into.update(zip(names, columns.T, strict=True))
    return made


def _mean_result(rows: Sequence[_PartialResult], language: str, part: str, own_seconds: float) -> _PartialResult:
    """The plain mean of rows that have the same metrics, replicate by replicate."""
    first = rows[0]
    return _PartialResult(
        language=language,
        direction=part,
        metrics={name: sum(row.metrics[name] for row in rows) / len(rows) for name in first.metrics},
        chance={name: sum(row.chance[name] for row in rows) / len(rows) for name in first.chance},
        n=sum(row.n for row in rows),
        replicates={
            name: torch.stack([row.replicates[name] for row in rows]).nanmean(dim=0) for name in first.replicates
        },
        shared_seconds=first.shared_seconds,
        own_seconds=own_seconds,
    )


def _flatten(rows: Sequence[_PartialResult]) -> dict[str, float]:
    return {
        "/".join(filter(None, (row.language, row.direction, name))): value
        for row in rows
        for name, value in row.metrics.items()
    }


def _metric_names(question: EvaluationQueries) -> tuple[str, ...]:
    """The numbers of one question, by part and name, and their means over the parts where there are several."""
    parts = question.directions if len(question.directions) == 1 else (*question.directions, "")
    return tuple("/".join(filter(None, (part, name))) for part in parts for name in question.metric_names)


def _macro_name(title: str) -> str:
    return f"macro:{title}"


def _check_primary(primary: str, names: Sequence[str]) -> None:
    if primary not in names:
        raise UserError(f"there is no metric {primary!r}; {_nearest(primary, names)}")


def _nearest(given: str, known: Sequence[str]) -> str:
    return f"nearest of {len(known)}: {', '.join(get_close_matches(given, known, n=3, cutoff=0.0))}"
