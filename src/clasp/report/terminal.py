"""What a person sees in the terminal: bars while something is read, tables at the end. Reads plain values, prints text.

Progress and remarks go to standard error; tables, the answer to what was asked, go to standard output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from clasp.evaluation.tasks import EvaluationResult
from clasp.models.dual_encoder import ParameterCount
from clasp.models.sharing.policy import SharingPlan
from clasp.report.model_card import result_tables
from clasp.report.tables import retention_table
from clasp.types import ProgressCallback

_PART_TITLES = {
    "model": "whole model",
    "image": "image tower",
    "text": "text tower",
    "shared": "in both towers",
    "heads": "heads",
    "scale": "scale",
}


def print_status(line: str) -> None:
    """A remark on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressCallback]:
    """A bar that appears with the first call of the progress function it gives; plain lines where nobody watches."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=Console(stderr=True), transient=False) as rich:
            task = rich.add_task(title, visible=False)
            yield lambda done, total: rich.update(task, completed=done, total=total, visible=True)
        return
    started = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= 10:
            last = now
            print_status(f"{title}: {done:,} of {total:,}, {done / max(now - started, 1e-9):,.0f}/s")

    yield line


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """A table on standard output: the first column to the left, numbers to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", caption=note or None, caption_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    for row in rows:
        made.add_row(*row)
    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False).print(made)


def print_parameter_counts(counts: dict[str, ParameterCount], sharing: SharingPlan | None = None) -> None:
    """Who trains; and what both towers hold in common, layer by layer."""
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
        print(f"\nwhat the two nets share\n{sharing}")


def print_results(title: str, results: Sequence[EvaluationResult]) -> None:
    """Results with their intervals, and what guessing scores: a table for each task.

    What towers still know is laid out by what it was before and is after.
    """
    if any(result.task.startswith("retention/") for result in results):
        made = retention_table(results)
        return print_table(title, made.columns, made.rows, "\n".join(made.notes))
    for grid in result_tables(results):
        note = "per cent, with 95 % intervals; guessing: the same metrics in the same order"
        print_table(title, grid.columns, grid.rows, note)


def format_megabytes(count: int) -> str:
    """Bytes as megabytes (10^6)."""
    return f"{count / 1e6:,.1f} MB"
