"""Charts as inline SVG: lines over steps, points with intervals, rows of points, heat maps.

Input: numbers, and the place of each run in the report, which is its colour, dash and shape. Output: ``Html``. Note:
colours are classes of ``report.css`` (Okabe and Ito's colour-blind-safe palette), so they follow light, dark and paper;
after seven runs they repeat with another dash and another shape. ``<title>`` elements are the tooltips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clasp.report.chart_axes import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Axis, Number, frame, svg, tick_text
from clasp.report.html_elements import Html, escaped

_COLOURS = 7  # of report.css
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_HEIGHT = 250
_LABEL_WIDTH, _ROW_HEIGHT = 150, 16
_LOGARITHMIC_FROM = 20.0  # ratio of the largest value to the smallest from which an axis is logarithmic


@dataclass(frozen=True, slots=True)
class ChartSeries:
    """The line of one run: ``place`` among the runs, values by x."""

    label: str
    place: int
    values: dict[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartPoint:
    """A value with its interval; ``filled``: not dominated by another."""

    label: str
    place: int
    x: float
    y: float
    interval: tuple[float, float] | None = None
    filled: bool = True


@dataclass(frozen=True, slots=True)
class ChartRow:
    """Values of one row of a chart, one for each run that has it, and their chance level."""

    label: str
    points: Sequence[ChartPoint]
    chance: float | None = None


def swatch(place: int) -> Html:
    """The line and the point of a run, as in the charts."""
    line = f'<line class="curve" x1="0" x2="28" y1="6" y2="6"{_dash(place)}/>'
    return Html(
        f'<svg class="swatch c{place % _COLOURS}" viewBox="0 0 28 12" aria-hidden="true">{line}'
        f"{_shape(place, 14, 6, True, '')}</svg>"
    )


def legend(labels: Sequence[str]) -> Html:
    """The swatch of every run; nothing for a single run."""
    items = "".join(f"<li>{swatch(place)}{escaped(label)}</li>" for place, label in enumerate(labels))
    return Html(f'<ul class="legend" aria-label="runs">{items}</ul>' if len(labels) > 1 else "")


def line_chart(series: Sequence[ChartSeries], x_title: str, y_title: str, description: str) -> Html:
    """A line for each run. A run with a single value is a point."""
    x = Axis.covering([0, *(step for each in series for step in each.values)], LEFT, WIDTH - RIGHT, floor=0)
    values = [value for each in series for value in each.values.values()]
    y = Axis.covering(values, _HEIGHT - BOTTOM, TOP, ceiling=Axis.most(y_title, values))
    parts = [frame(x, y, x_title, y_title)]
    for each in series:
        places = [(x.at(step), y.at(value)) for step, value in each.values.items()]
        path = " ".join(f"{across},{up}" for across, up in places)
        few = len(places) <= 12
        dots = "".join(
            _shape(each.place, *at, True, f"{each.label}: {value:.4g} at step {step:,}", radius=2.5)
            for at, (step, value) in zip(places, each.values.items(), strict=True)
            if few
        )
        title = f"<title>{escaped(each.label)}</title>"
        line = f'<polyline class="curve" points="{path}"{_dash(each.place)}>{title}</polyline>'
        parts.append(Html(f'<g class="c{each.place % _COLOURS}">{line}{dots}</g>'))
    return svg(_HEIGHT, description, "".join(parts))


def point_chart(points: Sequence[ChartPoint], x_title: str, y_title: str, description: str) -> Html:
    """A point for each run with its interval in y; logarithmic in x over a wide range of positive values."""
    across = [point.x for point in points]
    wide = min(across) > 0 and max(across) / min(across) >= _LOGARITHMIC_FROM
    x = Axis.covering(across, LEFT, WIDTH - RIGHT, floor=0, ceiling=Axis.most(x_title, across), logarithmic=wide)
    ends = [end for point in points for end in (point.y, *(point.interval or ()))]
    y = Axis.covering(ends, _HEIGHT - BOTTOM, TOP, floor=0, ceiling=Axis.most(y_title, ends))
    parts = [frame(x, y, x_title + (", log scale" if wide else ""), y_title)]
    for point in points:
        at, title = x.at(point.x), f"{point.label}: {point.y:.1f} at {tick_text(point.x)}"
        bar = ""
        if point.interval is not None:
            low, high = (y.at(end) for end in point.interval)
            bar = f'<line class="bar" x1="{at}" x2="{at}" y1="{low}" y2="{high}"/>'
        shape = _shape(point.place, at, y.at(point.y), point.filled, title)
        parts.append(Html(f'<g class="c{point.place % _COLOURS}">{bar}{shape}</g>'))
    return svg(_HEIGHT, description, "".join(parts))


def row_chart(rows: Sequence[ChartRow], x_title: str, description: str) -> Html:
    """A row for each label: the runs' points with their intervals below each other, and a bar at chance."""
    values = [end for row in rows for point in row.points for end in (point.x, *(point.interval or ()))]
    values += [row.chance for row in rows if row.chance is not None]
    floor, ceiling = 0 if min(values) >= 0 else None, Axis.most(x_title, values)
    x = Axis.covering([0.0, *values], _LABEL_WIDTH, WIDTH - RIGHT, floor=floor, ceiling=ceiling)
    heights = [_ROW_HEIGHT + 8 * (len(row.points) - 1) + 4 for row in rows]
    bottom = TOP + sum(heights)
    # an axis of no height: the frame draws the ticks of x alone
    parts = []
    for tick in x.ticks():
        at = x.at(tick)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 15}" text-anchor="middle">{tick_text(tick)}</text>')
    middle = (_LABEL_WIDTH + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 31}" text-anchor="middle">{escaped(x_title)}</text>')
    top = float(TOP)
    for row, height in zip(rows, heights, strict=True):
        parts.append(_row(row, x, top, height))
        top += height
    return svg(bottom + BOTTOM, description, "".join(parts))


def heat_map(values: Sequence[Sequence[float]], x_title: str, y_title: str, description: str, highest: float) -> Html:
    """Cells of which the opacity is the value over ``highest``, that of maps with the same scale; the first row is at
    the bottom, both sides count from 1."""
    highest = highest or 1.0
    rows, columns = len(values), len(values[0])
    size = min((WIDTH - LEFT - RIGHT) / columns, 26.0)
    bottom, parts = TOP + size * rows, []
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            x, y = LEFT + size * column, bottom - size * (row + 1)
            box = f'x="{x:.1f}" y="{y:.1f}" width="{size:.1f}" height="{size:.1f}"'
            title = f"<title>{escaped(y_title)} {row + 1}, {escaped(x_title)} {column + 1}: {value:.3f}</title>"
            parts.append(f'<rect class="heat" {box} fill-opacity="{max(0.0, value / highest):.3f}">{title}</rect>')
    box = f'x="{LEFT}" y="{TOP}" width="{size * columns:.1f}" height="{size * rows:.1f}"'
    parts.append(f'<rect class="cell" {box}/>')
    for column in range(0, columns, 1 + columns // 13):
        x = LEFT + size * (column + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{column + 1}</text>')
    for row in range(0, rows, 1 + rows // 13):
        y = bottom - size * (row + 0.5) + 4
        parts.append(f'<text x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">{row + 1}</text>')
    middle, half = LEFT + size * columns / 2, TOP + size * rows / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 32:.1f}" text-anchor="middle">{escaped(x_title)}</text>')
    turned = f'transform="translate(11 {half:.1f}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {turned}>{escaped(y_title)}</text>")
    return svg(bottom + BOTTOM, description, "".join(parts))


def _row(row: ChartRow, x: Axis, top: Number, height: Number) -> Html:
    middle = top + height / 2
    label = row.label if len(row.label) <= 24 else f"{row.label[:23]}…"
    parts = [f'<text class="strong" x="{_LABEL_WIDTH - 8}" y="{middle + 4}" text-anchor="end">{escaped(label)}</text>']
    if row.chance is not None:
        at = x.at(row.chance)
        title = f"<title>chance: {row.chance:.1f}</title>"
        parts.append(f'<line class="chance" x1="{at}" x2="{at}" y1="{top + 2}" y2="{top + height - 2}">{title}</line>')
    for number, point in enumerate(row.points):
        y = middle + 8 * (number - (len(row.points) - 1) / 2)
        bar = ""
        if point.interval is not None:
            low, high = (x.at(end) for end in point.interval)
            bar = f'<line class="bar" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
        shape = _shape(point.place, x.at(point.x), y, True, f"{point.label}, {row.label}: {point.x:.1f}", radius=3)
        parts.append(f'<g class="c{point.place % _COLOURS}">{bar}{shape}</g>')
    return Html("".join(parts))


def _dash(place: int) -> str:
    dash = _DASHES[place // _COLOURS % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _shape(place: int, x: Number, y: Number, filled: bool, title: str, radius: Number = 4) -> Html:
    """Circle, square, diamond or triangle: neighbours among the runs differ by shape too."""
    kind = "point" if filled else "point hollow"
    told = f"<title>{escaped(title)}</title>" if title else ""
    r = radius
    match (place + 2 * (place // _COLOURS)) % 4:
        case 0:
            return Html(f'<circle class="{kind}" cx="{x}" cy="{y}" r="{r}">{told}</circle>')
        case 1:
            corners = ((-r, -r), (r, -r), (r, r), (-r, r))
        case 2:
            corners = ((0, -1.3 * r), (1.3 * r, 0), (0, 1.3 * r), (-1.3 * r, 0))
        case _:
            corners = ((0, -1.2 * r), (1.2 * r, r), (-1.2 * r, r))
    points = " ".join(f"{x + across:.1f},{y + up:.1f}" for across, up in corners)
    return Html(f'<polygon class="{kind}" points="{points}">{told}</polygon>')
