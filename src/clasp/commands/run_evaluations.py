"""The evaluations of a run on its validation pairs: metrics for the loop, and the scores of its final weights.

Input: the validation task, the encoder that it evaluates, and the processes that train together. Output: a dict of
metrics each time it is called, and the scores of single queries once the loop has ended. Note: the final weights are
those of an evaluation in the loop, whose scores are kept: they are embedded once, not twice.
"""

from __future__ import annotations

from collections.abc import Mapping

from clasp.evaluation.tasks import EvaluationTask, ScoredQueries
from clasp.training.distributed import Processes
from clasp.training.state import FitResult
from clasp.types import Encoder


class RunEvaluations:
    """Evaluates a model while it is trained."""

    def __init__(self, task: EvaluationTask, encoder: Encoder, processes: Processes):
        self.task, self._encoder, self._processes = task, encoder, processes
        self._scored: list[list[ScoredQueries]] = []

    def __call__(self) -> Mapping[str, float]:
        """The metrics of the weights as they are, to the last bit the same on all processes."""
        metrics = self.task.metrics(self._evaluate())
        return self._processes.first(lambda: metrics)

    def of_final_weights(self, fitted: FitResult) -> list[ScoredQueries]:
        """The scores of the weights that training ended with; evaluated here where this session has not done it."""
        if fitted.evaluation is None:
            return self._evaluate()
        return self._scored[fitted.evaluation]

    def _evaluate(self) -> list[ScoredQueries]:
        with self._processes.alike():
            self._scored.append(self.task.scored(self._encoder))
        return self._scored[-1]
