"""The table of a suite: each data set with the metric of the benchmark, and their mean.

Input: the rows of ``evaluate_suite``. Output: an ``AnnotatedTable``. Note: the mean is over the sets that were
evaluated, whatever their metric, as benchmarks average; where some are missing it is not comparable with others.
"""

from __future__ import annotations

from collections.abc import Sequence

from clasp.data.sample_size import MIN_QUERIES, small_sample_warning
from clasp.errors import counted
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.suites import SuiteSet
from clasp.report.tables import AnnotatedTable, format_interval, format_metric, metric_title

_COLUMNS = ("data set", "metric", "value", "95 %", "chance", "queries", "s")


def suite_table(rows: Sequence[tuple[SuiteSet, EvaluationResult | None]], elsewhere: int = 0) -> AnnotatedTable:
    """A row for each set that was evaluated, and the mean; ``elsewhere``: tasks of the suite that mteb computes."""
    cells = [_cells(each, result) for each, result in rows if result is not None]
    values = [result.metrics[each.metric] for each, result in rows if result is not None]
    cells.append([f"mean of {len(values)}", "", format_metric("", sum(values) / len(values)), "", "", "", ""])
    missing = len(rows) - len(values)
    notes = (
        [f"{missing} of {len(rows)} sets are missing (status lines name them): this mean is not that of the suite"]
        if missing
        else []
    )
    if elsewhere:
        notes.append(
            f"{counted(elsewhere, 'more task')} of the suite in mteb, on clasp.as_mteb(RUN); its mean is over all"
        )
    asked = [result.n for _, result in rows if result is not None]
    few = sum(count < MIN_QUERIES for count in asked)
    notes = [*small_sample_warning(min(asked), f"queries in {few} of {len(asked)} sets"), *notes]
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
