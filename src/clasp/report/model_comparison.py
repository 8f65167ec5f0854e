"""The comparison of two models as a table and a sentence: for the terminal (``clasp compare``).

Input: ``Comparison``s. Output: ``AnnotatedTable`` and a line. Note: of a language only the main metric is a row; all
are in ``comparison.json``.
"""

from __future__ import annotations

from collections.abc import Sequence

from clasp.data.sample_size import small_sample_warning
from clasp.evaluation.comparison import Comparison
from clasp.evaluation.language_sets import macro_set
from clasp.report.tables import INTERVAL_TITLE, AnnotatedTable, metric_title, most_queries

_NOTE = (
    "per cent; difference: A minus B, in points, with its 95 % interval on the same queries; p: McNemar's exact test "
    "(*) or bootstrap, not corrected for the number of rows"
)


def model_comparison_table(comparisons: Sequence[Comparison], primary: Comparison) -> AnnotatedTable:
    """A row for each metric, the first column naming direction or language."""
    rows = []
    for each in comparisons:
        of_language = each.language and macro_set(each.language) is None
        if of_language and (each.metric != primary.metric or "/" in each.task):
            continue
        direction = each.task.partition("/")[2].replace("_", " ")
        label = ", ".join(filter(None, (macro_set(each.language) or each.language, direction)))
        low, high = each.interval
        rows.append(
            [
                f"{label}: {metric_title(each.metric)}" if label else metric_title(each.metric),
                f"{100 * each.first:.1f}",
                f"{100 * each.second:.1f}",
                f"{100 * each.difference:+.1f}",
                f"{100 * low:+.1f} to {100 * high:+.1f}",
                _format_p(each.p_value).removeprefix("= ") + ("*" if each.test == "mcnemar" else ""),
            ]
        )
    counts = [(each.language, each.n) for each in comparisons if macro_set(each.language) is None]
    few = small_sample_warning(most_queries(counts)[1], "queries") if counts else []
    columns = (primary.task.partition("/")[0], "A", "B", "difference", INTERVAL_TITLE, "p")
    return AnnotatedTable(columns, rows, [*few, _NOTE])


def comparison_sentence(first: str, second: str, primary: Comparison) -> str:
    """Which model is better in the primary metric, by how much, or that no difference is shown."""
    low, high, points = (100 * value for value in (*primary.interval, primary.difference))
    metric, p = metric_title(primary.metric), _format_p(primary.p_value)
    if not primary.significant:
        return (
            f"no difference shown in {metric}: {first} minus {second} is {points:+.1f} points "
            f"({low:+.1f} to {high:+.1f}), p {p}, {primary.n:,} queries"
        )
    better, worse = (first, second) if points > 0 else (second, first)
    ends = sorted((abs(low), abs(high)))
    return (
        f"{better} is better than {worse} by {abs(points):.1f} points of {metric} ({ends[0]:.1f} to {ends[1]:.1f}), "
        f"p {p}, {primary.n:,} queries"
    )


def _format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"
