"""Tables: rows of results in, cells and notes for people out. Plain values; whoever shows them decides how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clasp.evaluation.paired import result_label
from clasp.evaluation.tasks import EvaluationResult

_UNCHANGED = "the base's weights as they were"


@dataclass(frozen=True, slots=True)
class AnnotatedTable:
    """Columns, rows of as many cells, and lines to stand below them."""

    columns: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str]


def retention_table(results: Sequence[EvaluationResult]) -> AnnotatedTable:
    """The rows of ``clasp eval RUN retention`` in which a probe is compared, in per cent; a line on each drift.

    The drift of each part, and the points between base and tuned weights, are in the figure and in ``results.jsonl``.
    """
    rows = [
        [
            result_label(result),
            *(_with_interval(result, state) for state in ("before", "after", "change")),
            _chance(result),
        ]
        for result in results
        if "change" in result.metrics
    ]
    notes = ["per cent, with 95 % intervals; that of the change is of the same queries before and after"]
    notes += [_drift(results, side) for side in ("image", "text")]
    return AnnotatedTable(("retention", "before", "after", "change", "guessing"), rows, notes)


def _with_interval(result: EvaluationResult, state: str) -> str:
    value, interval, sign = result.metrics[state], result.interval[state], "+" if state == "change" else ""
    return f"{100 * value:{sign}.1f} ({100 * interval.low:{sign}.1f} to {100 * interval.high:{sign}.1f})"


def _chance(result: EvaluationResult) -> str:
    return f"{100 * result.chance['before']:.1f}"


def _drift(results: Sequence[EvaluationResult], side: str) -> str:
    """One line on how far a tower is from its base, and which block most."""
    parts = {
        result.task.rpartition("/")[2]: result.metrics
        for result in results
        if result.task.startswith(f"retention/{side}_drift/")
    }
    whole = parts["all"]
    moved = {title: m["weights"] for title, m in parts.items() if title != "all" and m.get("weights")}
    line = f"{side} tower: "
    if moved:
        most = max(moved, key=lambda title: moved[title])
        line += f"weights moved by {_percent(whole['weights'])} of their norm, most in {most} ({_percent(moved[most])})"
    else:
        line += _UNCHANGED
    if whole["new"]:
        line += f"; {_percent(whole['new'])} of its parameters are new"
    return line + (f"; CKA of what it says {whole['cka']:.3f}" if "cka" in whole else "")


def _percent(fraction: float) -> str:
    """Two digits that matter: drift may be a millionth."""
    return f"{100 * fraction:.2g} %"
