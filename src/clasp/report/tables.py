"""Tables of results: rows of results in, cells and notes out, for the terminal and the model card alike.

The main metric comes first, then its 95 % interval and the chance level, then the other metrics. Fractions are in
per cent, ranks as they are. ``result_tables`` has every row; ``summary_tables`` folds the languages of a task to their
macro means, the worst and the best. Note: plain strings; the caller renders them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from clasp.data.sample_size import MIN_QUERIES, small_sample_warning
from clasp.errors import counted
from clasp.evaluation.language_sets import macro_set
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.tasks import RetrievalTask, ZeroShotTask
from clasp.report.evaluation_labels import EvaluationKey, evaluation_key, evaluation_labels

METRIC_TITLES = {"mean_per_class": "mean per class", "median_rank": "median rank", "mean_recall": "mean recall"}
INTERVAL_TITLE, CHANCE_TITLE = "95 %", "chance"
_MAIN_METRICS = (RetrievalTask.primary, ZeroShotTask.primary)
_RESULT_NOTE = "per cent; 95 %: interval of the number before it; chance: the chance level of that number"
_RETENTION_NOTE = "per cent; 95 %: interval of the change on the same queries; chance: the chance level"
_MAX_LANGUAGES = 3  # that a summary shows one by one
_RETENTION_LABELS = {
    "recall@": "R@",
    "image_knn": "image: k-NN",
    "image_linear": "image: linear probe",
    "/": ", ",
    "_": " ",
}


@dataclass(frozen=True, slots=True)
class AnnotatedTable:
    """Columns, rows of as many cells, and notes shown below them."""

    columns: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


class LabelledResult(NamedTuple):
    """A result and the label of its row."""

    label: str
    result: EvaluationResult


class LanguageSummary(NamedTuple):
    """Rows that summarise many languages, and how many rows were left out."""

    rows: list[LabelledResult]
    left_out: int


# --- numbers ---------------------------------------------------------------------------------------------------------


def format_metric(name: str, value: float) -> str:
    """A rank as it is, a fraction in per cent."""
    return f"{value:,.1f}" if "rank" in name else f"{100 * value:.1f}"


def format_interval(name: str, interval: Sequence[float] | None) -> str:
    """Both ends; empty where there is none."""
    return "–".join(format_metric(name, end) for end in interval) if interval else ""


def metric_title(name: str) -> str:
    """The column title of a metric."""
    return METRIC_TITLES.get(name, name.replace("recall@", "R@").replace("_", " "))


def main_metric(result: EvaluationResult) -> str:
    """The primary metric: mean recall, top-1 accuracy, or a task's first metric."""
    return next((name for name in _MAIN_METRICS if name in result.metrics), next(iter(result.metrics)))


# --- tasks -----------------------------------------------------------------------------------------------------------


def result_tables(results: Sequence[EvaluationResult]) -> list[AnnotatedTable]:
    """A table for each task and kind of metrics, with all rows.

    Of a language with both directions only their mean is shown.
    """
    tables = []
    for task, rows in labelled_by_task(results):
        table = result_table(task, rows, metrics_main_first(rows[0].result))
        tables.append(replace(table, notes=[*few_queries(of_table(rows, results)), *table.notes]))
    return tables


def summary_tables(results: Sequence[EvaluationResult], more_in: str) -> list[AnnotatedTable]:
    """The same with languages folded; a note says how many more of them are in ``more_in``."""
    tables = []
    for task, rows in labelled_by_task(results):
        metrics = metrics_main_first(rows[0].result)
        summary = fold_languages(rows, metrics[0])
        table = result_table(task, summary.rows, metrics)
        notes = [*few_queries(of_table(rows, results)), *table.notes, *more_note(summary.left_out, more_in)]
        tables.append(replace(table, notes=notes))
    return tables


def result_table(
    head: str,
    rows: Sequence[LabelledResult],
    metrics: Sequence[str],
    beside: Mapping[str, Callable[[EvaluationResult], str]] | None = None,
) -> AnnotatedTable:
    """A row for each result; the first of ``metrics`` is the main one.

    ``beside``: title to cell function of further columns after those of the main metric.
    """
    main, *others = metrics
    beside = beside or {}
    columns = (head, metric_title(main), INTERVAL_TITLE, CHANCE_TITLE, *beside, *map(metric_title, others))
    cells = [
        [
            label,
            format_metric(main, result.metrics[main]),
            format_interval(main, result.interval.get(main)),
            format_metric(main, result.chance[main]) if main in result.chance else "",
            *(cell(result) for cell in beside.values()),
            *(format_metric(name, result.metrics[name]) for name in others),
        ]
        for label, result in rows
    ]
    return AnnotatedTable(columns, cells, [_RESULT_NOTE])


def fold_languages(rows: Sequence[LabelledResult], metric: str) -> LanguageSummary:
    """The rows that are of no language or of a set, then the languages; of many languages the worst and the best."""
    languages = [row for row in rows if row.result.language and macro_set(row.result.language) is None]
    others = [row for row in rows if row not in languages]
    if len(languages) <= _MAX_LANGUAGES:
        return LanguageSummary([*others, *languages], 0)
    ordered = sorted(languages, key=lambda row: row.result.metrics[metric], reverse="rank" in metric)
    worst, best = ordered[0], ordered[-1]
    ends = [worst._replace(label=f"{worst.label} (worst)"), best._replace(label=f"{best.label} (best)")]
    return LanguageSummary([*others, *ends], len(languages) - len(ends))


def few_queries(results: Sequence[EvaluationResult]) -> list[str]:
    """A warning where an evaluation has few queries, or metrics that are 100 % for any model.

    Both of the language that has most queries, counted in the direction that has fewer.
    """
    evaluations: dict[EvaluationKey, list[EvaluationResult]] = {}
    for result in results:
        if macro_set(result.language) is None:
            evaluations.setdefault(evaluation_key(result), []).append(result)
    asked, certain = [], {}
    for rows in evaluations.values():
        largest, count = most_queries([(row.language, row.n) for row in rows])
        asked.append(count)
        chances = [row.chance for row in rows if row.language == largest]
        names = [name for name in chances[0] if "rank" not in name and all(each.get(name, 0) >= 1 for each in chances)]
        certain |= dict.fromkeys(map(metric_title, names))
    if not asked:
        return []
    few = sum(count < MIN_QUERIES for count in asked)
    where = "" if len(asked) == 1 else f" in {few} of {len(asked)} evaluations"
    return small_sample_warning(min(asked), f"queries{where}", list(certain))


def selection_note(candidates: int, what: str = "step") -> list[str]:
    """A note below results on the pairs by which one of several steps or stages was selected."""
    if candidates < 2:
        return []
    return [
        f"the same pairs selected the {what} among {candidates}, which the interval leaves out: the value is biased "
        "upwards; clasp eval on other pairs is not"
    ]


def most_queries(rows: Sequence[tuple[str, int]]) -> tuple[str, int]:
    """Of languages with their numbers of queries by direction: the language with most, in its smaller direction."""
    counts: dict[str, int] = {}
    for language, count in rows:
        counts[language] = min(count, counts.get(language, count))
    return max(counts.items(), key=lambda item: item[1])


def of_table(rows: Sequence[LabelledResult], results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    """All rows of the evaluations that a table shows."""
    shown = {evaluation_key(row.result) for row in rows}
    return [result for result in results if evaluation_key(result) in shown]


def more_note(count: int, more_in: str) -> list[str]:
    """A note on where the rows are that are not shown."""
    return [f"{counted(count, 'more language')} in {more_in}"] if count else []


def labelled_by_task(results: Sequence[EvaluationResult]) -> list[tuple[str, list[LabelledResult]]]:
    """The rows of each task in order; those with other metrics than the first apart. Of a language with both directions
    only the mean is a row.

    Evaluations of one row each are rows of one table, labelled by data and options; of several evaluations with more
    rows each has a table of its own, and the task is followed by that label.
    """
    both = {(evaluation_key(result), result.language) for result in results if "/" not in result.task}
    directed = {evaluation_key(result) for result in results if "/" in result.task}
    counts = Counter(map(evaluation_key, results))
    labels = evaluation_labels(results)
    kinds: dict[tuple[str, EvaluationKey | None, tuple[str, ...]], list[LabelledResult]] = {}
    for result in results:
        key, direction = evaluation_key(result), result.task.partition("/")[2]
        if direction and result.language and (key, result.language) in both:
            continue
        alone = counts[key] == 1 and not result.language and key not in directed
        label = (
            (macro_set(result.language) or result.language)
            or direction.replace("_", " ")
            or ("both directions" if key in directed else labels[key])
        )
        place = (key.task, None if alone else key, tuple(result.metrics))
        kinds.setdefault(place, []).append(LabelledResult(label, result))
    several = Counter(key.task for key in labels)
    return [
        (task if key is None or several[task] == 1 else f"{task} on {labels[key]}", rows)
        for (task, key, _), rows in kinds.items()
    ]


def metrics_main_first(result: EvaluationResult) -> list[str]:
    """The names of the metrics, the primary one first."""
    main = main_metric(result)
    return [main, *(name for name in result.metrics if name != main)]


# --- retention -------------------------------------------------------------------------------------------------------


def retention_table(results: Sequence[EvaluationResult], more_in: str) -> AnnotatedTable:
    """The rows of ``clasp eval RUN retention`` that compare two states, languages folded; a line on each tower's drift.

    The drift of each part, and the points between base and tuned weights, are in the figure and in ``results.jsonl``.
    """
    compared = [LabelledResult(retention_label(each), each) for each in results if "change" in each.metrics]
    rows, left_out = [], 0
    for task in dict.fromkeys(row.result.task for row in compared):
        summary = fold_languages([row for row in compared if row.result.task == task], "change")
        rows += [_retention_cells(*row) for row in summary.rows]
        left_out += summary.left_out
    few = small_sample_warning(min((row.result.n for row in compared), default=MIN_QUERIES), "queries")
    notes = [
        *few,
        _RETENTION_NOTE,
        *more_note(left_out, more_in),
        *(_drift(results, side) for side in ("image", "text")),
    ]
    return AnnotatedTable(("retention", "change", INTERVAL_TITLE, "before", "after", CHANCE_TITLE), rows, notes)


def retention_label(result: EvaluationResult) -> str:
    """The label of a retention row, in a table or a figure: ``text R@1, never trained: zu``."""
    task = result.task.partition("/")[2]
    for written, shown in _RETENTION_LABELS.items():
        task = task.replace(written, shown)
    if macro_set(result.language) is not None:
        return f"{task}: mean"
    return f"{task}: {result.language}" if result.language else task


def _retention_cells(label: str, result: EvaluationResult) -> list[str]:
    low, high = result.interval["change"]
    before, after = (format_metric(state, result.metrics[state]) for state in ("before", "after"))
    change, between = f"{100 * result.metrics['change']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"
    return [label, change, between, before, after, format_metric("before", result.chance["before"])]


def _drift(results: Sequence[EvaluationResult], side: str) -> str:
    """One line on the drift of a tower from its base weights, and of its most changed block."""
    parts = {
        result.task.rpartition("/")[2]: result.metrics
        for result in results
        if result.task.startswith(f"retention/{side}_drift/")
    }
    whole = parts["all"]
    moved = {title: m["weights"] for title, m in parts.items() if title != "all" and m.get("weights")}
    line = f"{side} tower: "
    if moved:
        most = max(moved, key=lambda title: moved[title])
        line += f"weights moved by {_percent(whole['weights'])} of their norm, most in {most} ({_percent(moved[most])})"
    else:
        line += "the base's weights, unchanged"
    if whole["new"]:
        line += f"; {_percent(whole['new'])} of its parameters are new"
    return line + (f"; CKA with the base {whole['cka']:.3f}" if "cka" in whole else "")


def _percent(fraction: float) -> str:
    """Two significant digits: drift may be a millionth."""
    return f"{100 * fraction:.2g} %"
