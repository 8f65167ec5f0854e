"""Evaluation tasks: images plus one kind of queries (zero-shot, retrieval), or queries per language (multilingual).

Input: an encoder. Output: ``results``, rows for ``results.jsonl`` with bootstrap intervals; ``scored``, the scores of
single queries, from which ``finish`` makes the rows; or, called as an ``Evaluator``, one flat dict of metrics. Note:
images are embedded once, however many languages there are; every row has the chance level of each metric; the groups
resampled for intervals are common to all languages, so that a macro mean has its own interval. Depends on protocols
only: no model, no tokenizer, no files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, runtime_checkable

from clasp.data.plugins import valid_names
from clasp.evaluation.embedding_table import EmbeddingTable, ImageBatches, embed_batches
from clasp.evaluation.language_sets import LanguageSets, check_language_sets, macro_language, macro_results
from clasp.evaluation.query_scores import QueryScores, resample_scores
from clasp.evaluation.results import EvaluationResult, PartialResult, PrimaryScore, mean_result
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.zeroshot import ZeroShotQueries
from clasp.types import Encoder, UserError


@runtime_checkable
class EvaluationQueries(Protocol):
    """Queries about embedded images: ``ZeroShotQueries``, ``RetrievalQueries`` and others."""

    @property
    def directions(self) -> tuple[str, ...]: ...

    @property
    def metric_names(self) -> tuple[str, ...]: ...

    def score(self, encoder: Encoder, images: EmbeddingTable) -> list[QueryScores]:
        """The scores of all queries, in each direction."""
        ...


_QueriesT = TypeVar("_QueriesT", bound=EvaluationQueries)


@dataclass(frozen=True, slots=True)
class ScoredQueries:
    """The scores of all queries in one language, in each direction, and the seconds that they took."""

    language: str
    scores: list[QueryScores]
    shared_seconds: float
    own_seconds: float


class EvaluationTask:
    """What all tasks have in common: from scored queries to rows, and to the primary metric."""

    data: str
    name: str
    primary: str
    resamples: int
    seed: int

    def scored(self, encoder: Encoder) -> list[ScoredQueries]:
        """The scores of single queries, in each language. Raises ``UserError`` naming the data."""
        raise NotImplementedError

    def partial_results(self, scored: Sequence[ScoredQueries], resamples: int) -> list[PartialResult]:
        """The rows of these scores, with ``resamples`` bootstrap replicates."""
        return _resample(scored, resamples, self.seed)

    def finish(self, scored: Sequence[ScoredQueries]) -> list[EvaluationResult]:
        """The rows of these scores, with 95 % intervals."""
        return [row.finish(self.name, self.data) for row in self.partial_results(scored, self.resamples)]

    def results(self, encoder: Encoder) -> list[EvaluationResult]:
        """``finish`` of ``scored``."""
        return self.finish(self.scored(encoder))

    def score(self, encoder: Encoder) -> PrimaryScore:
        """``primary_score`` of ``scored``."""
        return self.primary_score(self.scored(encoder))

    def primary_score(self, scored: Sequence[ScoredQueries]) -> PrimaryScore:
        """The primary metric with its replicates, to be compared with that of another encoder."""
        return _primary_score(self.partial_results(scored, self.resamples), self.primary)

    def metrics(self, scored: Sequence[ScoredQueries]) -> dict[str, float]:
        """The metrics of these scores by name."""
        return _flatten(self.partial_results(scored, 0))

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """``metrics`` of ``scored``."""
        return self.metrics(self.scored(encoder))


@dataclass(kw_only=True)
class SingleTask(EvaluationTask, Generic[_QueriesT]):
    """One kind of queries about the images: a row per direction, then one for the mean over several directions."""

    data: str
    images: ImageBatches
    queries: _QueriesT
    name: str
    primary: str
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        _check_primary(self.primary, _metric_names(self.queries))

    def scored(self, encoder: Encoder) -> list[ScoredQueries]:
        return score_queries(encoder, self.data, self.images, {"": self.queries})


@dataclass(kw_only=True)
class ZeroShotTask(SingleTask[ZeroShotQueries]):
    """Classify images by class names alone. Metrics: ``top1``, ``top5``, ``mean_per_class``."""

    name: str = "zeroshot"
    primary: str = "top1"


@dataclass(kw_only=True)
class RetrievalTask(SingleTask[RetrievalQueries]):
    """Find captions by image and images by caption.

    Metrics: ``recall@1``, ``@5``, ``@10``, ``mean_recall`` and ``median_rank``, under ``image_to_text/`` and
    ``text_to_image/``, and without prefix the means of both directions where both are evaluated.
    """

    name: str = "retrieval"
    primary: str = "mean_recall"


@dataclass(kw_only=True)
class MultilingualTask(EvaluationTask):
    """Queries per language about the same images, and the macro means over named sets of languages.

    Metrics: those of the queries under ``LANGUAGE/`` and ``macro:SET/``; a macro mean gives each language the same
    weight. ``sets`` maps a name to the languages in it, whose queries must be of the same kind.
    """

    data: str
    images: ImageBatches
    queries: Mapping[str, EvaluationQueries]
    primary: str
    sets: LanguageSets = field(default_factory=dict)
    name: str = "multilingual"
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.queries:
            raise UserError(f"{self.name} on {self.data}: there is no language to ask in")
        names = [f"{language}/{name}" for language, queries in self.queries.items() for name in _metric_names(queries)]
        check_language_sets(self.sets, list(self.queries))
        for title, languages in self.sets.items():
            kinds = {_metric_names(self.queries[language]) for language in languages}
            if len(kinds) > 1:
                raise UserError(f"the set {title!r} mixes queries with different metrics; give one kind of queries")
            names += [f"{macro_language(title)}/{name}" for name in kinds.pop()]
        _check_primary(self.primary, names)

    def scored(self, encoder: Encoder) -> list[ScoredQueries]:
        return score_queries(encoder, self.data, self.images, self.queries)

    def partial_results(self, scored: Sequence[ScoredQueries], resamples: int) -> list[PartialResult]:
        """The rows of every language, then those of every set."""
        rows = super().partial_results(scored, resamples)
        return [*rows, *macro_results(rows, self.sets)]


# --- rows ----------------------------------------------------------------------------------------------------------


def score_queries(
    encoder: Encoder, data: str, images: ImageBatches, queries: Mapping[str, EvaluationQueries]
) -> list[ScoredQueries]:
    """Embed the images once, then score the queries of every language."""
    start = time.perf_counter()
    with _locate_errors(data):
        embedded = embed_batches(images(), encoder.embed_image, "image")
    shared = time.perf_counter() - start
    scored = []
    for language, each in queries.items():
        start = time.perf_counter()
        with _locate_errors(f"{data} in {language!r}" if language else data):
            scores = each.score(encoder, embedded)
        scored.append(ScoredQueries(language, scores, shared, time.perf_counter() - start))
    return scored


def _resample(scored: Sequence[ScoredQueries], resamples: int, seed: int) -> list[PartialResult]:
    """A row per language and direction, with replicates on draws of the groups common to all languages."""
    replicates = iter(resample_scores([one for each in scored for one in each.scores], resamples, seed))
    rows = []
    for each in scored:
        directions = [
            PartialResult(
                language=each.language,
                direction=one.direction,
                metrics=one.metrics(),
                chance=dict(one.chance),
                n=len(one.groups),
                replicates=next(replicates),
                shared_seconds=each.shared_seconds,
                own_seconds=each.own_seconds,
            )
            for one in each.scores
        ]
        rows += directions
        if len(directions) > 1:
            rows.append(mean_result(directions, language=each.language, direction="", own_seconds=each.own_seconds))
    return rows


@contextmanager
def _locate_errors(where: str) -> Iterator[None]:
    """Re-raise a ``UserError`` with the data and language it occurred in."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _flatten(rows: Sequence[PartialResult]) -> dict[str, float]:
    return {
        "/".join(filter(None, (row.language, row.direction, name))): value
        for row in rows
        for name, value in row.metrics.items()
    }


def _primary_score(rows: Sequence[PartialResult], primary: str) -> PrimaryScore:
    for row in rows:
        for name, value in row.metrics.items():
            if "/".join(filter(None, (row.language, row.direction, name))) == primary:
                return PrimaryScore(value, row.replicates[name])
    raise AssertionError(f"no row has {primary!r}")


def _metric_names(queries: EvaluationQueries) -> tuple[str, ...]:
    """The metric names of some queries by direction, and those of the means over several directions."""
    directions = queries.directions if len(queries.directions) == 1 else (*queries.directions, "")
    return tuple("/".join(filter(None, (part, name))) for part in directions for name in queries.metric_names)


def _check_primary(primary: str, names: Sequence[str]) -> None:
    if primary not in names:
        raise UserError(f"there is no metric {primary!r}; {valid_names(primary, names)}")
