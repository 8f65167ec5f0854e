"""Formatting of numbers and lines in the tables of studies."""

from __future__ import annotations

from collections.abc import Iterable

from studies.paired_intervals import Measured, Of, difference


def told(seen: Measured | None, of: Of, *, short: bool = False) -> str:
    """Per cent with its interval; differences are signed."""
    if seen is None:
        return "–"
    sign = "+" if of is difference else ""
    value, low, high = (f"{100 * number:{sign}.1f}" for number in (seen.value, seen.low, seen.high))
    return value if short else f"{value} ({low} to {high})"


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
