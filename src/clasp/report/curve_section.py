"""The section of learning curves: training loss and validation metric by step. Input: ``RunRecord``s. Output: markup.

Note: losses are comparable only between runs with the same loss and the same batch size; where these differ, a note
names the keys. A run without a gradient step has no curve, and is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from clasp.errors import counted
from clasp.report.html_elements import Html, escaped, figure, figure_row, missing_in, paragraph
from clasp.report.run_comparison import title_with_languages
from clasp.report.run_record import RunRecord
from clasp.report.svg_charts import ChartSeries, legend, line_chart
from clasp.report.tables import AnnotatedTable

_LOSS_KEYS = ("loss.kind", "loss.positives", "loss.negatives", "train.batch_size")
_MAX_TABLE_STEPS = 200  # of a curve, in the table under it; ``log.jsonl`` has all


def curve_blocks(records: Sequence[RunRecord]) -> list[Html]:
    """Both charts, and what is missing in them."""
    logged = [record.curves() for record in records]
    curves = [replace(each, loss=_finite(each.loss), validation=_finite(each.validation)) for each in logged]
    loss = [
        ChartSeries(record.label, place, each.loss)
        for place, (record, each) in enumerate(zip(records, curves, strict=True))
        if each.loss
    ]
    figures = [_figure("Training loss", loss, "loss")] if loss else []
    # one chart per metric: a run validated by classification cannot share an axis with one validated by retrieval
    for metric in dict.fromkeys(each.metric for each in curves if each.validation):
        series = [
            ChartSeries(record.label, place, {step: 100 * value for step, value in each.validation.items()})
            for place, (record, each) in enumerate(zip(records, curves, strict=True))
            if each.metric == metric and len(each.validation) > 1
        ]
        languages, _, name = metric.rpartition("/")
        title = title_with_languages(name, languages)
        if series:
            figures.append(_figure(f"Validation: {title}, per cent", series, f"{title}, per cent"))
    blocks = [legend([record.label for record in records]), figure_row(figures)] if figures else []
    if len(loss) > 1 and (differing := _differing(records, _LOSS_KEYS)):
        note = f"The runs differ in {', '.join(differing)}, so their losses are not comparable."
        blocks.append(paragraph(escaped(note), "note"))
    without_log = [record.label for record in records if not record.events]
    without_steps = [r.label for r, each in zip(records, logged, strict=True) if r.events and not each.loss]
    pairs = zip(records, logged, curves, strict=True)
    diverged = [record.label for record, all_, kept in pairs if len(all_.loss) > len(kept.loss)]
    blocks.append(missing_in(diverged, "the loss was not a finite number at some steps, which are left out."))
    blocks.append(missing_in(without_log, "no log.jsonl, as in an imported run or where it was deleted."))
    blocks.append(missing_in(without_steps, "no gradient step was logged, so there is no loss curve."))
    return blocks


def _figure(title: str, series: Sequence[ChartSeries], y_title: str) -> Html:
    steps = sorted({step for each in series for step in each.values})
    cells = [[f"{step:,}", *(_cell(each.values, step) for each in series)] for step in steps[:_MAX_TABLE_STEPS]]
    more = len(steps) - _MAX_TABLE_STEPS
    notes = [f"{counted(more, 'more step')} in log.jsonl."] if more > 0 else []
    table = AnnotatedTable(("step", *(each.label for each in series)), cells, notes)
    return figure(title, line_chart(series, "step", y_title, f"{title}: {_description(series)}"), table)


def _description(series: Sequence[ChartSeries]) -> str:
    """The ends of every line, as the chart's text alternative."""
    told = []
    for each in series:
        first, last = min(each.values), max(each.values)
        start, end = each.values[first], each.values[last]
        told.append(f"{each.label} from {start:.3g} at step {first:,} to {end:.3g} at step {last:,}")
    return "; ".join(told)


def _finite(values: Mapping[int, float]) -> dict[int, float]:
    """Those that have a place in a chart."""
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _cell(values: Mapping[int, float], step: int) -> str:
    return f"{values[step]:.4g}" if step in values else ""


def _differing(records: Sequence[RunRecord], keys: Sequence[str]) -> list[str]:
    settings = [record.settings for record in records]
    return [key for key in keys if len({str(each.get(key)) for each in settings}) > 1]
