"""The evaluations of a run on its validation pairs: metrics for the loop, and the scores of its final weights.

Input: the validation task, the encoder that it evaluates, and the processes that train together. Output: a dict of
metrics each time it is called, and the scores of single queries once the loop has ended. Note: the final weights are
those of the newest evaluation or of the best, whose scores are kept (without embeddings), so they are embedded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from clasp.evaluation.tasks import EvaluationTask, ScoredQueries
from clasp.training.distributed import Processes
from clasp.training.state import FitResult
from clasp.types import Encoder


class RunEvaluations:
    """Evaluates a model while it is trained."""

    def __init__(self, task: EvaluationTask, encoder: Encoder, processes: Processes):
        self.task, self._encoder, self._processes = task, encoder, processes
        self._count, self._best, self._best_value = 0, 0, -math.inf
        self._kept: dict[int, list[ScoredQueries]] = {}

    def __call__(self) -> Mapping[str, float]:
        """The metrics of the weights as they are, to the last bit the same on all processes."""
        scored = self._evaluate()
        own = self.task.metrics(scored)
        metrics = self._processes.first(lambda: own)
        number, value = self._count, metrics[self.task.primary]
        if value > self._best_value:  # as the loop selects: the first of equal ones, never NaN after a number
            self._best, self._best_value = number, value
        self._kept[number] = scored
        self._kept = {kept: self._kept[kept] for kept in {self._best, number}}
        self._count += 1
        return metrics

    def of_final_weights(self, fitted: FitResult) -> list[ScoredQueries]:
        """The scores of the weights that training ended with; evaluated here where this session has not done it."""
        return self._evaluate() if fitted.evaluation is None else self._kept[fitted.evaluation]

    def _evaluate(self) -> list[ScoredQueries]:
        with self._processes.alike():
            scored = self.task.scored(self._encoder)
        return [replace(each, scores=[replace(one, predict=None) for one in each.scores]) for each in scored]
