"""Terminal output of runs: training progress, parameter counts, results. Input: plain values. Output: text."""

from __future__ import annotations

from collections.abc import Sequence

from clasp.errors import printable
from clasp.evaluation.results import EvaluationResult
from clasp.models.dual_encoder import ParameterCount
from clasp.models.sharing.policy import SharingPlan
from clasp.report.console import format_megabytes, print_lines, print_table
from clasp.report.tables import retention_table, summary_tables
from clasp.training.trackers.console import Reporter, TrainProgress, stderr_reporter

_PART_TITLES = {
    "model": "whole model",
    "image": "image tower",
    "text": "text tower",
    "shared": "in both towers",
    "heads": "heads",
    "scale": "scale",
}


class PrintableReporter:
    """A ``Reporter`` whose notes pass through ``printable``: they name samples and files."""

    def __init__(self, inner: Reporter):
        self._inner = inner

    def start(self, steps: int) -> None:
        self._inner.start(steps)

    def step(self, progress: TrainProgress) -> None:
        self._inner.step(progress)

    def note(self, line: str) -> None:
        self._inner.note(printable(line))

    def stop(self) -> None:
        self._inner.stop()


def terminal_reporter() -> Reporter:
    """Shows training on standard error."""
    return PrintableReporter(stderr_reporter())


def print_parameter_counts(counts: dict[str, ParameterCount], sharing: SharingPlan | None = None) -> None:
    """Total and trainable parameters of each part; and the weight sharing of the towers, layer by layer."""
    rows = [
        [
            _PART_TITLES[part],
            f"{count.total:,}",
            f"{count.trained:,}",
            f"{count.percent:.2f}",
            format_megabytes(count.delta_bytes),
        ]
        for part, count in counts.items()
    ]
    print_table("parameters", ("part", "in all", "trained", "%", "delta"), rows)
    if sharing is not None:
        print_lines(["", "shared by both towers", *str(sharing).splitlines()])


def print_results(title: str, results: Sequence[EvaluationResult], more_in: str, notes: Sequence[str] = ()) -> None:
    """A table for each task: its main metric, 95 % interval and chance first; many languages folded to a summary.

    ``more_in`` names the files in which all rows are; ``notes`` are on all of them.
    """
    if any(result.task.startswith("retention/") for result in results):
        tables = [retention_table(results, more_in)]
    else:
        tables = summary_tables(results, more_in)
    for table in tables:
        print_table(title, table.columns, table.rows, [*table.notes, *notes])
