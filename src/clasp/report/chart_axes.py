"""Axes of an SVG chart: from values to pixels, round tick marks, and the lines and titles of a frame.

Input: the values that an axis has to cover. Output: an ``Axis``, and markup. Note: a logarithmic axis is chosen by the
caller and only for positive values; its ticks are at 1, 2 and 5 times powers of ten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clasp.report.html_elements import Html, escaped

Number = float | int
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 420, 60, 14, 10, 40
"""Of a chart and its margins, in the units of its ``viewBox``: pixels at the width of a phone"""
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Axis:
    """From a range of values to a range of pixels; ``start`` may lie above ``end``."""

    low: Number
    high: Number
    start: Number
    end: Number
    logarithmic: bool = False

    @classmethod
    def covering(
        cls,
        values: Sequence[Number],
        start: Number,
        end: Number,
        *,
        floor: Number | None = None,
        ceiling: Number | None = None,
        logarithmic: bool = False,
    ) -> Axis:
        """An axis over all values with some room at its ends, which is neither below ``floor`` nor above ``ceiling``,
        where they are given."""
        assert values, "an axis of no values"
        if logarithmic:
            assert min(values) > 0, f"a logarithmic axis from {min(values)}"
            low, high = math.log10(min(values)), math.log10(max(values))
            room = max(0.08 * (high - low), 0.08)
            return cls(10 ** (low - room), 10 ** (high + room), start, end, True)
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = low - room, high + room
        low, high = low if floor is None else max(low, floor), high if ceiling is None else min(high, ceiling)
        return cls(low, high, start, end)

    @staticmethod
    def most(title: str, values: Sequence[Number]) -> Number | None:
        """The ceiling of an axis: 100 where its title says per cent, and no value is above."""
        return 100 if "per cent" in title and max(values) <= 100 else None

    def at(self, value: Number) -> float:
        """The pixel of a value, to a tenth."""
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, at_most: int = 6) -> list[Number]:
        """Round values inside the range."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [step * 10.0**power for power in powers for step in steps]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= at_most:
                    break
            return found or [self.low]
        rough = (self.high - self.low) / at_most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step for factor in (1, 2, 5, 10) if (step := factor * power) >= 0.999 * rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def tick_text(value: Number) -> str:
    """A tick in few characters: ``0.05``, ``200``, ``1.5 k``, ``3e-05``."""
    for size, prefix in _SI:
        if abs(value) >= size:
            return f"{value / size:g} {prefix}"
    return f"{value:.4g}"


def frame(x: Axis, y: Axis, x_title: str, y_title: str) -> Html:
    """Grid, ticks and titles of a chart."""
    left, right, bottom, top = min(x.start, x.end), max(x.start, x.end), max(y.start, y.end), min(y.start, y.end)
    parts = []
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4}" text-anchor="end">{tick_text(tick)}</text>')
    for tick in x.ticks():
        at = x.at(tick)
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{tick_text(tick)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 33}" text-anchor="middle">{escaped(x_title)}</text>')
    middle = (top + bottom) / 2
    parts.append(f'<text transform="translate(10 {middle}) rotate(-90)" text-anchor="middle">{escaped(y_title)}</text>')
    return Html("".join(parts))


def svg(height: Number, description: str, content: str) -> Html:
    """A drawing with its text alternative."""
    return Html(f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escaped(description)}">{content}</svg>')
