"""The evaluations of a run: the final weights are those of one of them, and are not embedded again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from clasp.commands.run_evaluations import RunEvaluations
from clasp.evaluation.query_scores import QueryScores
from clasp.evaluation.tasks import EvaluationTask, ScoredQueries
from clasp.training.distributed import Processes
from clasp.training.state import FitResult, TrainPosition
from toysearch import Colours


class Luck(EvaluationTask):
    """Each evaluation has the next of some values."""

    data, name, primary, resamples, seed = "dice", "luck", "luck", 0, 0

    def __init__(self, values: Sequence[float]):
        self.values, self.calls = values, 0

    def scored(self, encoder: Any) -> list[ScoredQueries]:
        value = self.values[self.calls]
        self.calls += 1
        found = QueryScores("", ("a",), ("g",), {}, {"luck": value}, {"luck": 0.0}, ("x",), lambda: ["x"])
        return [ScoredQueries("", [found], 0.0, 0.0)]

    def metrics(self, scored: Sequence[ScoredQueries]) -> dict[str, float]:
        return {"luck": value_of(scored)}


def value_of(scored: Sequence[ScoredQueries]) -> float:
    return scored[0].scores[0].medians["luck"]


def fitted(evaluation: int | None) -> FitResult:
    at, metrics = TrainPosition(), dict[str, float]()
    return FitResult(at, at, False, metrics, "float32", pairs=0, seconds=0.0, evaluation=evaluation)


@pytest.mark.parametrize(
    ("values", "best"),
    [([0.1, 0.3, 0.3, 0.2], 1), ([0.5, 0.4, 0.1], 0), ([math.nan, 0.2, math.nan], 1), ([math.nan, math.nan], 0)],
)
def test_final_weights_are_evaluated_once(values: list[float], best: int) -> None:
    task = Luck([*values, 7.0])
    evaluations = RunEvaluations(task, Colours(), Processes())
    metrics: list[Mapping[str, float]] = [evaluations() for _ in values]
    assert [str(each["luck"]) for each in metrics] == [str(value) for value in values]
    for number in (best, len(values) - 1):  # train.select = "best", "last"
        scored = evaluations.of_final_weights(fitted(number))
        assert str(value_of(scored)) == str(values[number]) and scored[0].scores[0].predict is None
    assert task.calls == len(values)
    assert value_of(evaluations.of_final_weights(fitted(None))) == 7.0, "the weights of an earlier session"
