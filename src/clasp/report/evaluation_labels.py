"""The names of evaluations in tables and titles: the data, and the options that are not at their default.

Input: results. Output: evaluations told apart (``EvaluationKey``), the last row of each, and a label for each that no
other evaluation of its task has. Note: rows of earlier versions have no options; they are told apart by their data
alone, and their label says so where a recorded evaluation has the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from clasp.evaluation.registry import changed_options
from clasp.evaluation.results import EvaluationResult

_MAX_VALUE = 60  # characters of an option


class EvaluationKey(NamedTuple):
    """What distinguishes evaluations: the task, and its ``evaluation_id`` or, where that was not recorded, its data."""

    task: str
    identity: str


def evaluation_key(result: EvaluationResult) -> EvaluationKey:
    """The evaluation that a row belongs to."""
    return EvaluationKey(result.task.partition("/")[0], result.evaluation_id or result.data)


def latest_results(results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    """The results without those that were repeated later: same evaluation, row and metrics."""
    latest = {(evaluation_key(each), each.task, each.language, tuple(each.metrics)): each for each in results}
    return list(latest.values())


def evaluation_label(result: EvaluationResult) -> str:
    """The data, and the options that are not at their default; other evaluations may have the same label."""
    return ", ".join((result.data, *option_texts(evaluation_key(result).task, result.options or {})))


def option_texts(task: str, options: Mapping[str, str]) -> list[str]:
    """The options that are not at their default, each cut to a readable length."""
    return [
        text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE // 2]}…{text[-_MAX_VALUE // 2 :]}"
        for text in changed_options(task, options)
    ]


def evaluation_labels(results: Sequence[EvaluationResult]) -> dict[EvaluationKey, str]:
    """A label for each evaluation; those of one task differ."""
    rows = {evaluation_key(result): result for result in results}
    labels = {key: evaluation_label(result) for key, result in rows.items()}
    often = Counter((key.task, label) for key, label in labels.items())
    return {
        key: label if often[key.task, label] == 1 else f"{label} ({_apart(rows[key])})" for key, label in labels.items()
    }


def _apart(result: EvaluationResult) -> str:
    """What distinguishes evaluations of the same label: other pairs, or other files, of the same names."""
    return f"content {result.evaluation_id[:6]}" if result.evaluation_id else "options not recorded"
