"""The table of a suite: each data set with the metric of the benchmark, and their mean.

Input: the rows of ``evaluate_suite``. Output: an ``AnnotatedTable``. Note: the mean is over the sets that were
evaluated, whatever their metric, as benchmarks average; where some are missing it is not comparable with others.
"""

from __future__ import annotations

from collections.abc import Sequence

from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.suites import SuiteSet
from clasp.report.tables import AnnotatedTable, format_interval, format_metric, metric_title

_COLUMNS = ("data set", "metric", "value", "95 %", "chance", "queries", "s")


def suite_table(rows: Sequence[tuple[SuiteSet, EvaluationResult | None]]) -> AnnotatedTable:
    """A row for each set that was evaluated, and the mean."""
    cells = [_cells(each, result) for each, result in rows if result is not None]
    values = [result.metrics[each.metric] for each, result in rows if result is not None]
    cells.append([f"mean of {len(values)}", "", format_metric("", sum(values) / len(values)), "", "", "", ""])
    missing = len(rows) - len(values)
    notes = (
        [f"{missing} of {len(rows)} sets are missing (status lines name them): this mean is not that of the suite"]
        if missing
        else []
    )
    return AnnotatedTable(_COLUMNS, cells, notes)


def _cells(each: SuiteSet, result: EvaluationResult) -> list[str]:
    value, chance = result.metrics[each.metric], result.chance.get(each.metric)
    return [
        each.name,
        metric_title(each.metric),
        format_metric(each.metric, value),
        format_interval(each.metric, result.interval.get(each.metric)),
        "" if chance is None else format_metric(each.metric, chance),
        f"{result.n:,}",
        f"{result.seconds:,.0f}",
    ]
