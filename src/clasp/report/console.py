"""Console output: status lines, errors, JSON, progress bars, tables. Input: plain values. Output: text.

Progress and status lines go to standard error; tables and findings, the results, go to standard output.
Note: every text passes through ``printable``, and reaches rich as ``Text``, so that captions, file names and paths are
shown as they were typed: no markup, no emoji codes, no control characters. Tables fit 100 columns, a row on one line.
Nothing here imports torch; rich is imported by what draws with it, since ``clasp search --json`` waits for no import.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clasp.errors import UNPRINTABLE, printable

TABLE_WIDTH = 100  # columns, where standard output is no terminal


# --- text ------------------------------------------------------------------------------------------------------------


def relative_path(path: str | Path) -> str:
    """A path as seen from the current folder; one outside of it as it is."""
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def format_megabytes(count: int) -> str:
    """Bytes as megabytes (10^6)."""
    return f"{count / 1e6:,.1f} MB"


# --- lines -----------------------------------------------------------------------------------------------------------


def print_status(line: str) -> None:
    """A status line on standard error."""
    _print_line(line, to_stderr=True)


def print_error(line: str) -> None:
    """An error in the user's input, in one line on standard error."""
    _print_line(f"clasp: {line}", to_stderr=True)


def print_lines(lines: Iterable[object]) -> None:
    """Lines of a result, on standard output."""
    for line in lines:
        _print_line(str(line))


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    print(UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _print_line(line: str, *, to_stderr: bool = False) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=to_stderr).print(Text(printable(line)), soft_wrap=True)


# --- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that appears with the first call of the returned function; plain lines where there is no terminal."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=Console(stderr=True), transient=False) as rich:
            task = rich.add_task(printable(title), visible=False)
            yield lambda done, total: rich.update(task, completed=done, total=total, visible=True)
        return
    started = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= 10:
            last = now
            rate = done / max(now - started, 1e-9)
            print_status(f"{title}: {done:,} of {total:,}" + (f", {rate:,.0f}/s" if rate >= 1 else ""))

    yield line


# --- tables ----------------------------------------------------------------------------------------------------------


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """A table on standard output, the first column to the left, numbers to the right; below it the notes.

    A row is one line: where the widest columns do not fit, the middle of their cells is replaced by an ellipsis. Cells
    of the first column that were cut are written whole below the table.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)
    grid = [[printable(cell) for cell in row] for row in (columns, *rows)]
    widths = _fitted_widths(grid, console.width)
    shown = [[_cut_middle(*cell) for cell in zip(row, widths, strict=True)] for row in grid]
    head, *body = [[Text(cell) for cell in row] for row in shown]
    table = Table()
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    console.print(Text(printable(title), style="bold"))
    console.print(table)
    cut = {whole[0]: part[0] for whole, part in zip(grid, shown, strict=True) if whole[0] != part[0]}
    for line in (*(f"{part} is {whole}" for whole, part in cut.items()), *map(printable, notes)):
        console.print(Text(line, style="dim"))


def _fitted_widths(grid: Sequence[Sequence[str]], room: int) -> list[int]:
    """Cells a column, the widest cut until the table fits into ``room``: borders and padding take three a column."""
    widths = [max(map(_cells, column)) for column in zip(*grid, strict=True)]
    while sum(widths) + 3 * len(widths) + 1 > room and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    return widths


def _cells(text: str) -> int:
    """The width of a text in a terminal."""
    from rich.cells import cell_len

    return cell_len(text)


def _cut_middle(text: str, width: int) -> str:
    """At most ``width`` cells: the beginning and the end of a text that is longer."""
    if _cells(text) <= width:
        return text
    return f"{_start(text, width // 2)}…{_start(text[::-1], (width - 1) // 2)[::-1]}"


def _start(text: str, width: int) -> str:
    taken = ""
    for character in text:
        if _cells(taken + character) > width:
            break
        taken += character
    return taken
