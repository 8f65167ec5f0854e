"""Retrieval within equal parts of the pairs, and the mean over the parts: COCO's "1K test" is five of its 5,000 images.

Input: pairs and a number of folds. Output: a task with the rows of ``RetrievalTask``. Note: folds are consecutive, as
those of Karpathy & Fei-Fei (CVPR 2015) are, and of as many groups each, to one. A fold has fewer competitors than all
pairs have, so numbers of different folds are not comparable. All images and captions are embedded at once, as without
folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clasp.data.pairs import Pairs
from clasp.evaluation.embedding_table import EvaluationInputs, ImageBatches
from clasp.evaluation.from_pairs import pairs_of, retrieval_queries
from clasp.evaluation.results import PartialResult, mean_result
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.tasks import EvaluationTask, RetrievalTask, ScoredQueries, score_queries
from clasp.types import Encoder, UserError


@dataclass(kw_only=True)
class FoldedRetrievalTask(EvaluationTask):
    """Every fold has queries about its own images; ``language`` of its scores names it."""

    data: str
    images: ImageBatches
    folds: Mapping[str, RetrievalQueries]
    name: str = RetrievalTask.name
    primary: str = RetrievalTask.primary
    resamples: int = 1000
    seed: int = 0

    def scored(self, encoder: Encoder) -> list[ScoredQueries]:
        return score_queries(encoder, self.data, self.images, self.folds)

    def partial_results(self, scored: Sequence[ScoredQueries], resamples: int) -> list[PartialResult]:
        """The mean over the folds, in each direction and over both."""
        by_direction: dict[str, list[PartialResult]] = {}
        for row in super().partial_results(scored, resamples):
            by_direction.setdefault(row.direction, []).append(row)
        return [
            mean_result(rows, language="", direction=direction, own_seconds=sum(row.own_seconds for row in rows))
            for direction, rows in by_direction.items()
        ]


def folded_retrieval_task(pairs: Pairs, inputs: EvaluationInputs, *, folds: str, data: str) -> FoldedRetrievalTask:
    """Raises ``UserError`` for a number of folds that is none, or more than there are groups."""
    in_memory = list(pairs)
    distinct = list(dict.fromkeys(pair.group for pair in in_memory))
    if not (folds.isdecimal() and 2 <= int(folds) <= len(distinct) // 2):
        most = len(distinct) // 2
        must = f"must be a whole number from 2 to {most}: half of" if most >= 2 else "needs four images, more than"
        raise UserError(f"folds={folds} {must} the {len(distinct)} of {data}, since each fold needs two")
    inputs.precompute_texts(caption.text for pair in in_memory for caption in pair.captions)
    parts = [set(part) for part in np.array_split(np.array(distinct), int(folds))]
    queries = {
        f"fold {number}": retrieval_queries([pair for pair in in_memory if pair.group in part], inputs)
        for number, part in enumerate(parts, 1)
    }
    candidates = {id for fold in queries.values() for id in fold.image_groups}
    return FoldedRetrievalTask(data=data, images=inputs.images(pairs_of(candidates, pairs)), folds=queries)
