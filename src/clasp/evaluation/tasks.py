"""Evaluation tasks: images plus one kind of queries (zero-shot, retrieval), or queries per language (multilingual).

Input: an encoder. Output: ``results``, rows for ``results.jsonl`` with bootstrap intervals; or, called as an
``Evaluator``, one flat dict of metrics without intervals. Note: images are embedded once, however many languages there
are; every row has the chance level of each metric; the groups resampled for intervals are common to all languages, so
that a macro mean has its own interval. Depends on protocols only: no model, no tokenizer, no files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from clasp.evaluation.embedding_table import ImageBatches, embed_batches
from clasp.evaluation.language_sets import LanguageSets, check_language_sets, macro_language, macro_results
from clasp.evaluation.name_checks import nearest_names
from clasp.evaluation.query_scores import QueryScores, resample_scores
from clasp.evaluation.results import EvaluationResult, PartialResult, PrimaryScore, mean_result
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.zeroshot import ZeroShotQueries
from clasp.types import Encoder, UserError

EvaluationQueries = ZeroShotQueries | RetrievalQueries
_QueriesT = TypeVar("_QueriesT", ZeroShotQueries, RetrievalQueries)


@dataclass(kw_only=True)
class _SingleTask(Generic[_QueriesT]):
    """Base of the zero-shot and retrieval tasks: one kind of queries about the images."""

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
        """A row per direction, then one for their mean; one row where the queries have no directions."""
        rows = _evaluate(encoder, self.data, self.images, {self.language: self.queries}, self.resamples, self.seed)
        return [row.finish(self.name, self.data) for row in rows]

    def score(self, encoder: Encoder) -> PrimaryScore:
        """The primary metric with its replicates, to be compared with that of another encoder."""
        rows = _evaluate(encoder, self.data, self.images, {"": self.queries}, self.resamples, self.seed)
        return _primary_score(rows, self.primary)

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """The metrics by name."""
        return _flatten(_evaluate(encoder, self.data, self.images, {"": self.queries}))


@dataclass(kw_only=True)
class ZeroShotTask(_SingleTask[ZeroShotQueries]):
    """Classify images by class names alone. Metrics: ``top1``, ``top5``, ``mean_per_class``."""

    name: str = "zeroshot"
    primary: str = "top1"


@dataclass(kw_only=True)
class RetrievalTask(_SingleTask[RetrievalQueries]):
    """Find captions by image and images by caption.

    Metrics: ``recall@1``, ``@5``, ``@10``, ``mean_recall`` and ``median_rank``, under ``image_to_text/`` and
    ``text_to_image/``, and without prefix the means of both directions where both are evaluated.
    """

    name: str = "retrieval"
    primary: str = "mean_recall"


@dataclass(kw_only=True)
class MultilingualTask:
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

    def results(self, encoder: Encoder) -> list[EvaluationResult]:
        """The rows of every language, then those of every set."""
        rows = _evaluate(encoder, self.data, self.images, self.queries, self.resamples, self.seed)
        return [row.finish(self.name, self.data) for row in (*rows, *macro_results(rows, self.sets))]

    def score(self, encoder: Encoder) -> PrimaryScore:
        """The primary metric with its replicates, to be compared with that of another encoder."""
        rows = _evaluate(encoder, self.data, self.images, self.queries, self.resamples, self.seed)
        return _primary_score([*rows, *macro_results(rows, self.sets)], self.primary)

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """The metrics by name."""
        rows = _evaluate(encoder, self.data, self.images, self.queries)
        return _flatten([*rows, *macro_results(rows, self.sets)])


# --- rows ----------------------------------------------------------------------------------------------------------


def _evaluate(
    encoder: Encoder,
    data: str,
    images: ImageBatches,
    queries: Mapping[str, EvaluationQueries],
    resamples: int = 0,
    seed: int = 0,
) -> list[PartialResult]:
    """Embed the images, score the queries of every language, then resample the groups common to all languages."""
    start = time.perf_counter()
    with _locate_errors(data):
        embedded = embed_batches(images(), encoder.embed_image, "image")
    shared = time.perf_counter() - start
    scored: list[tuple[str, list[QueryScores], float]] = []
    for language, each in queries.items():
        start = time.perf_counter()
        with _locate_errors(f"{data} in {language!r}" if language else data):
            scores = each.score(encoder, embedded)
        scored.append((language, scores, time.perf_counter() - start))
    replicates = iter(resample_scores([one for _, scores, _ in scored for one in scores], resamples, seed))
    rows = []
    for language, scores, own in scored:
        directions = [
            PartialResult(
                language=language,
                direction=one.direction,
                metrics=one.metrics(),
                chance=dict(one.chance),
                n=len(one.groups),
                replicates=next(replicates),
                shared_seconds=shared,
                own_seconds=own,
            )
            for one in scores
        ]
        rows += directions
        if len(directions) > 1:
            rows.append(mean_result(directions, language=language, direction="", own_seconds=own))
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
        raise UserError(f"there is no metric {primary!r}; {nearest_names(primary, names)}")
