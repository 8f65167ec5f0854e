"""Retrieval within equal parts of the pairs, and the mean over the parts: COCO's "1K test" is five of its 5,000 images.

Input: pairs and a number of folds. Output: a task with the rows of ``RetrievalTask``. Note: folds are consecutive, as
those of Karpathy & Fei-Fei (CVPR 2015) are, and of as many groups each, to one. A fold has fewer competitors than all
pairs have, so numbers of different folds are not comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clasp.data.pairs import Pairs
from clasp.evaluation.embedding_table import EvaluationInputs
from clasp.evaluation.from_pairs import retrieval_task
from clasp.evaluation.results import PartialResult, mean_result
from clasp.evaluation.tasks import EvaluationTask, RetrievalTask, ScoredQueries
from clasp.types import Encoder, UserError


@dataclass(kw_only=True)
class FoldedRetrievalTask(EvaluationTask):
    """Every fold has its own queries and images; ``language`` of its scores names it."""

    data: str
    folds: Sequence[RetrievalTask]
    name: str = RetrievalTask.name
    primary: str = RetrievalTask.primary
    resamples: int = 1000
    seed: int = 0

    def scored(self, encoder: Encoder) -> list[ScoredQueries]:
        return [
            replace(each, language=f"fold {number}")
            for number, fold in enumerate(self.folds, 1)
            for each in fold.scored(encoder)
        ]

    def partial_results(self, scored: Sequence[ScoredQueries], resamples: int) -> list[PartialResult]:
        """The mean over the folds, in each direction and over both."""
        by_direction: dict[str, list[PartialResult]] = {}
        for row in super().partial_results(scored, resamples):
            by_direction.setdefault(row.direction, []).append(row)
        seconds = sum(each.shared_seconds for each in scored)
        return [
            replace(
                mean_result(rows, language="", direction=direction, own_seconds=sum(row.own_seconds for row in rows)),
                shared_seconds=seconds,
            )
            for direction, rows in by_direction.items()
        ]


def folded_retrieval_task(pairs: Pairs, inputs: EvaluationInputs, *, folds: str, data: str) -> FoldedRetrievalTask:
    """Raises ``UserError`` for a number of folds that is none, or more than there are groups."""
    groups = np.array([pair.group for pair in pairs])
    distinct = list(dict.fromkeys(groups.tolist()))
    if not (folds.isdecimal() and 2 <= int(folds) <= len(distinct) // 2):
        most = len(distinct) // 2
        must = f"must be a whole number from 2 to {most}: half of" if most >= 2 else "needs four images, more than"
        raise UserError(f"folds={folds} {must} the {len(distinct)} of {data}, since each fold needs two")
    parts = [set(part) for part in np.array_split(np.array(distinct), int(folds))]
    tasks = [
        retrieval_task(pairs.subset(np.flatnonzero([group in part for group in groups])), inputs, data=data)
        for part in parts
    ]
    return FoldedRetrievalTask(data=data, folds=tasks)
