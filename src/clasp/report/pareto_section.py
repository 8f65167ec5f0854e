"""The section that sets quality against cost: the primary metric over trained share, FLOPs, seconds and energy.

Input: ``RunRecord``s. Output: markup. Note: runs with other tasks, pairs or numbers of queries are in charts of their
own. A point is filled where no other run is at least as good at no more cost (it lies on the Pareto front of these
runs), hollow otherwise; the front ignores the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from clasp.errors import counted
from clasp.report.evaluation_labels import EvaluationKey, evaluation_key, evaluation_labels
from clasp.report.html_elements import Html, escaped, figure, figure_row, missing, missing_in, paragraph
from clasp.report.run_comparison import percent_interval, title_with_languages, total_seconds, trained_percent
from clasp.report.run_record import RunRecord
from clasp.report.svg_charts import ChartPoint, legend, point_chart
from clasp.report.tables import AnnotatedTable, format_interval, format_metric, main_metric, metric_title

_VALIDATION_KEYS = ("data.train", "data.val", "data.val_fraction", "train.seed")


def pareto_blocks(records: Sequence[RunRecord]) -> list[Html]:
    """A chart for each kind of cost that two comparable runs have, and what is missing in them."""
    groups: dict[tuple[EvaluationKey, str, str, int], list[int]] = {}
    primaries = [record.primary for record in records]
    labels = evaluation_labels([primary for primary in primaries if primary is not None])
    for place, p in enumerate(primaries):
        if p is not None:
            groups.setdefault((evaluation_key(p), p.language, main_metric(p), p.n), []).append(place)
    blocks = [legend([record.label for record in records])]
    for (key, language, metric, count), places in groups.items():
        figures = _figures(records, places, metric)
        if len(groups) > 1 and figures:
            title = f"{title_with_languages(metric, language)}: {key.task} on {labels[key]}, {counted(count, 'query')}"
            blocks.append(Html(f"<h3>{escaped(title)}</h3>"))
        blocks.append(figure_row(figures))
    if not any(len(places) > 1 for places in groups.values()):
        return [missing("No two runs were evaluated by the same metric on the same pairs, so there is no chart.")]
    note = "Filled: no other run is at least as good at no more cost. Vertical lines: 95 % intervals of each run alone."
    blocks.append(paragraph(escaped(note), "note"))
    settings = [record.settings for record in records]
    recorded = all(primary is None or primary.evaluation_id for primary in primaries)
    if not recorded and any(len({str(each.get(key)) for each in settings}) > 1 for key in _VALIDATION_KEYS):
        told = (
            "The runs differ in keys that choose the validation pairs; with as many queries these may still be others."
        )
        blocks.append(paragraph(escaped(told), "note"))
    blocks.append(missing_in([record.label for record in records if record.primary is None], "not evaluated."))
    for title, measure in _COSTS.items():
        without = [record.label for record in records if record.primary is not None and measure(record) is None]
        blocks.append(missing_in(without, f"not in the chart of {title}: not recorded."))
    return blocks


def _figures(records: Sequence[RunRecord], places: Sequence[int], metric: str) -> list[Html]:
    figures = []
    for title, measure in _COSTS.items():
        points = [p for place in places if (p := _point(place, records[place], measure)) is not None]
        if len(points) > 1:
            figures.append(_figure(title, mark_front(points), metric))
    return figures


def mark_front(points: Sequence[ChartPoint]) -> list[ChartPoint]:
    """The same points, ``filled`` on the Pareto front: low ``x``, high ``y``."""

    def dominated(point: ChartPoint) -> bool:
        return any(
            other.x <= point.x and other.y >= point.y and (other.x < point.x or other.y > point.y) for other in points
        )

    return [replace(point, filled=not dominated(point)) for point in points]


def _figure(title: str, points: Sequence[ChartPoint], metric: str) -> Html:
    name = f"{metric_title(metric)}, per cent"
    cells = [
        [p.label, f"{p.x:,.4g}", format_metric(metric, p.y / 100), _between(metric, p), "yes" if p.filled else "no"]
        for p in points
    ]
    table = AnnotatedTable(("run", title, name, "95 %", "on the front"), cells)
    told = "; ".join(f"{p.label}: {p.y:.1f} at {p.x:.4g}" for p in points)
    return figure(f"{name}, over {title}", point_chart(points, title, name, f"{name} over {title}: {told}"), table)


def _between(metric: str, point: ChartPoint) -> str:
    return "" if point.interval is None else format_interval(metric, [end / 100 for end in point.interval])


def _point(place: int, record: RunRecord, measure: Callable[[RunRecord], float | None]) -> ChartPoint | None:
    primary, cost = record.primary, measure(record)
    if primary is None or cost is None:
        return None
    name = main_metric(primary)
    if not math.isfinite(primary.metrics[name]):
        return None
    ends = percent_interval(primary, name)
    return ChartPoint(label=record.label, place=place, x=cost, y=100 * primary.metrics[name], interval=ends)


def _flops(record: RunRecord) -> float | None:
    cost = record.cost
    if cost is None or cost.forward_flops is None or cost.backward_flops is None:
        return None
    return (cost.forward_flops + cost.backward_flops) / 1e9


def _energy(record: RunRecord) -> float | None:
    cost = record.cost
    return None if cost is None or cost.energy_kwh is None else 1000 * cost.energy_kwh


_COSTS: Mapping[str, Callable[[RunRecord], float | None]] = {
    "trained parameters, per cent": lambda record: None if record.cost is None else trained_percent(record.cost),
    "GFLOP a pair, forward and backward": _flops,
    "seconds, all stages": total_seconds,
    "energy, Wh": _energy,
}
