"""The report of runs as one self-contained HTML file. Input: ``RunRecord``s. Output: the text of the file.

Sections: overview, differing recipe keys, learning curves, quality against cost, results by task and language,
retention, analysis, what a run with ``[auto]`` tried, confusions, retrieval examples, parameters, cost, facts. No model
is loaded.
Note: a part that a run lacks is named where it would be; the file is the same for the same folders, so it has no date.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from clasp.errors import counted
from clasp.evaluation.identity import is_own_validation
from clasp.evaluation.results import EvaluationResult
from clasp.report.analysis_section import analysis_blocks
from clasp.report.auto_table import AutoPlan, auto_table
from clasp.report.curve_section import curve_blocks
from clasp.report.evaluation_labels import evaluation_key, evaluation_labels, latest_results
from clasp.report.html_elements import (
    Html,
    beside,
    escaped,
    figure,
    folded,
    html_page,
    html_table,
    joined,
    missing,
    missing_in,
    paragraph,
    picture,
    section,
)
from clasp.report.pareto_section import pareto_blocks
from clasp.report.prediction_sheets import most_confused
from clasp.report.run_comparison import (
    RETENTION,
    ComparedResults,
    compare_results,
    comparison_table,
    cost_table,
    difference_tables,
    facts_table,
    overview_table,
    parameter_table,
    percent_interval,
    recipe_table,
)
from clasp.report.run_record import ClassPredictions, RunRecord
from clasp.report.svg_charts import ChartPoint, ChartRow, legend, row_chart, swatch
from clasp.report.tables import (
    AnnotatedTable,
    few_queries,
    format_metric,
    metric_title,
    metrics_main_first,
    result_table,
    retention_table,
    selection_note,
)

_ALTERNATIVES = {
    "searches.png": "Searches in several languages with the images found",
    "search.png": "The images found by the last search",
    "zeroshot.png": "Images of the classes that are confused most",
    "retrieval.png": "Captions with the image that is found first",
    "maps.png": "Similarity of the patches of some images to their captions and to single words",
    "retention.png": "Probes of the towers before and after alignment, and the change of each block",
}
_MAX_CHART_ROWS = 60  # legible; of more languages only the table has all


@dataclass(frozen=True, slots=True)
class _Section:
    title: str
    anchor: str
    blocks: Sequence[Html]


def render_html_report(records: Sequence[RunRecord]) -> str:
    """The text of the file; the runs keep their order, and their labels differ."""
    assert records and len({record.label for record in records}) == len(records)
    several = len(records) > 1
    parts = [
        _Section("Overview", "overview", _overview(records)),
        _Section("What differs between the recipes" if several else "Recipe", "recipes", _recipes(records)),
        _Section("Learning curves", "curves", curve_blocks(records)),
        *([_Section("Quality against cost", "pareto", pareto_blocks(records))] if several else []),
        _Section("Results by task and language", "results", _results(records)),
        _Section("Retention of pre-trained features", "retention", _retention(records)),
        _Section(
            "Analysis of the embedding space",
            "analysis",
            [*analysis_blocks(records), *_pictures(records, ["maps.png"])],
        ),
        *(_Section(f"Stages of {record.label}", f"auto-{n}", _auto(n, record)) for n, record in _with_plan(records)),
        *([_Section("Confusions", "confusions", confusions)] if (confusions := _confusions(records)) else []),
        _Section("Retrieval examples", "examples", _examples(records)),
        _Section("Parameters", "parameters", [_from_costs("Parameters by part", parameter_table(records), records)]),
        _Section("Cost", "cost", [_from_costs("Cost ledger", cost_table(records), records)]),
        _Section("Towers, pairs and settings", "facts", [html_table("Facts of the runs", facts_table(records))]),
    ]
    links = joined(Html(f'<a href="#{part.anchor}">{escaped(part.title)}</a>') for part in parts)
    title = f"{len(records)} runs compared" if several else records[0].label
    contents = [Html(f'<nav aria-label="sections">{links}</nav>')]
    contents += [section(part.title, part.anchor, part.blocks) for part in parts]
    return html_page(title, contents)


# --- sections --------------------------------------------------------------------------------------------------------


def _overview(records: Sequence[RunRecord]) -> list[Html]:
    marks = [swatch(place) for place in range(len(records))] if len(records) > 1 else []
    blocks = [html_table("Runs", overview_table(records), marks)]
    interrupted = [record.label for record in records if record.state == "interrupted"]
    unread = [record.label for record in records if record.unread_lines]
    blocks.append(missing_in(interrupted, "interrupted; its numbers are those of its last saved state."))
    blocks.append(missing_in(unread, "the last line of log.jsonl is cut short and was not read."))
    return blocks


def _recipes(records: Sequence[RunRecord]) -> list[Html]:
    whole = [
        folded(f"all keys of {each.label}", html_table(f"Recipe of {each.label}", recipe_table(each)))
        for each in records
    ]
    if len(records) == 1:
        return whole
    shared, partial = difference_tables(records)
    blocks = [html_table("Differing recipe keys", shared)] if shared.rows else []
    if partial.rows:
        title = f"{counted(len(partial.rows), 'key')} of only some of the runs"
        blocks.append(folded(title, html_table("Recipe keys of some runs", partial)))
    return [*(blocks or [paragraph(escaped("The recipes are equal."))]), *whole]


def _results(records: Sequence[RunRecord]) -> list[Html]:
    blocks, found = [legend([record.label for record in records])], compare_results(records)
    for compared in found:
        blocks.append(beside([_result_table(compared, records), *_result_chart(compared, records)]))
    lacking = [record.label for record in records if not record.results]
    if 1 < len(records) - len(lacking) and all(len(compared.rows) == 1 for compared in found):
        blocks.append(missing("No two runs have an evaluation in common (task, options, pairs), so none is compared."))
    return [*blocks, missing_in(lacking, "no results.jsonl: not evaluated.")]


def _result_table(compared: ComparedResults, records: Sequence[RunRecord]) -> Html:
    selected = _selection_notes(compared, records)
    if len(records) > 1:
        table = comparison_table(compared, records)
        return html_table(compared.title, replace(table, notes=[*table.notes, *selected]))
    rows = compared.rows[0]
    table = result_table(compared.task, rows, metrics_main_first(rows[0].result))
    return html_table(compared.title, replace(table, notes=[*few_queries(compared.results), *table.notes, *selected]))


def _selection_notes(compared: ComparedResults, records: Sequence[RunRecord]) -> list[str]:
    """Where the results are of the validation by which steps or stages were selected."""
    if not all(map(is_own_validation, compared.results)):
        return []
    notes = []
    for record in (records[run] for run in compared.rows):
        if record.settings.get("train.select", "best") != "best":
            continue
        staged = record.plan is not None
        count = record.plan.compared if record.plan else len(record.curves().validation)
        of = f"{record.label}: " if len(compared.rows) > 1 else ""
        notes += [f"{of}{note}" for note in selection_note(count, "stage" if staged else "step")]
    return notes


def _result_chart(compared: ComparedResults, records: Sequence[RunRecord]) -> list[Html]:
    name, rows = compared.metric, []
    for label in compared.labels:
        found = {run: result for run in compared.rows if (result := compared.result(run, label)) is not None}
        found = {run: result for run, result in found.items() if math.isfinite(result.metrics[name])}
        points = [_point(name, result, run, records[run].label) for run, result in found.items()]
        chances = {100 * result.chance[name] for result in found.values() if name in result.chance}
        if not points:
            continue
        rows.append(ChartRow(label, points, chances.pop() if len(chances) == 1 else None))
    if "rank" in name or not 2 <= len(rows) <= _MAX_CHART_ROWS:
        return []
    title = f"{metric_title(name)}, per cent"
    told = f"{title} by row of {compared.title}; the table below has every number"
    return [figure(f"{title}; lines: 95 % intervals, bars: chance", row_chart(rows, title, told))]


def _point(name: str, result: EvaluationResult, run: int, label: str) -> ChartPoint:
    ends = percent_interval(result, name)
    return ChartPoint(label=label, place=run, x=100 * result.metrics[name], y=0.0, interval=ends)


def _retention(records: Sequence[RunRecord]) -> list[Html]:
    blocks, lacking = [], []
    for record in records:
        rows = [each for each in latest_results(record.results) if each.task.startswith(RETENTION)]
        for key, label in evaluation_labels(rows).items():
            table = retention_table([each for each in rows if evaluation_key(each) == key], "results.jsonl of the run")
            blocks.append(html_table(f"{record.label}: retention on {label}", table))
        if not rows:
            lacking.append(record.label)
    note = missing_in(lacking, "retention was not evaluated (clasp eval RUN retention data=…).")
    return [*blocks, *_evaluation_pictures(records, "retention"), note]


def _auto(place: int, record: RunRecord) -> list[Html]:
    assert record.plan is not None
    table = auto_table(record.plan)
    titled = AnnotatedTable(tuple(table.columns), table.cells, list(table.notes))
    return [*_stage_chart(place, record.plan), html_table("Candidates and stages, in the order tried", titled)]


def _stage_chart(place: int, plan: AutoPlan) -> list[Html]:
    rows, metric = [], plan.primary.rpartition("/")[2]
    for row in plan.rows:
        if row.stage and row.metric is not None and "rank" not in metric:
            ends = None if row.interval is None else (100 * row.interval[0], 100 * row.interval[1])
            point = ChartPoint(label=row.verdict, place=place, x=100 * row.metric, y=0.0, interval=ends)
            rows.append(ChartRow(row.stage, [point]))
    if not rows:
        return []
    told = "; ".join(f"{row.label}: {format_metric(metric, row.points[0].x / 100)}" for row in rows)
    title = f"{metric_title(metric)} on the validation pairs, per cent"
    return [figure(f"{title}, by stage; lines: 95 % intervals", row_chart(rows, title, told))]


def _confusions(records: Sequence[RunRecord]) -> list[Html]:
    """Tables of the classes that are confused most, and pictures of them, where predictions were kept."""
    tables = [
        html_table(f"{record.label}: {kept.task} on {kept.label}", _confusion_table(kept))
        for record in records
        for kept in record.predictions
    ]
    return [*tables, *_evaluation_pictures(records, "zeroshot")]


def _confusion_table(kept: ClassPredictions) -> AnnotatedTable:
    rows = [
        [each.expected, each.predicted, f"{each.count:,}", f"{each.asked:,}"]
        for each in most_confused(kept.expected, kept.predicted)
    ]
    wrong = sum(right != answer for right, answer in zip(kept.expected, kept.predicted, strict=True))
    note = f"wrong: {wrong:,} of {counted(len(kept.expected), 'image')}; the most frequent confusions"
    return AnnotatedTable(("class", "predicted", "images", "of the class"), rows, [note])


def _examples(records: Sequence[RunRecord]) -> list[Html]:
    shown = [*_pictures(records, ["searches.png", "search.png"]), *_evaluation_pictures(records, "retrieval")]
    written = "clasp search RUN writes search.png, clasp eval RUN retrieval --predictions one of captions"
    return shown or [missing(f"No run has a picture of a search ({written}).")]


def _pictures(records: Sequence[RunRecord], names: Sequence[str]) -> list[Html]:
    return [
        figure(f"{record.label}: {name}", picture(record.pictures[name], _ALTERNATIVES[name]))
        for record in records
        for name in names
        if name in record.pictures
    ]


def _evaluation_pictures(records: Sequence[RunRecord], task: str) -> list[Html]:
    """The pictures of every evaluation of a task, each named by its data and options."""
    return [
        figure(f"{record.label}: {task} on {shown.label}", picture(shown.path, _ALTERNATIVES[f"{task}.png"]))
        for record in records
        for shown in record.evaluation_pictures
        if shown.task == task
    ]


def _from_costs(caption: str, table: AnnotatedTable, records: Sequence[RunRecord]) -> Html:
    lacking = [record.label for record in records if record.cost is None]
    note = missing_in(lacking, "no cost.json: the cost was not recorded.")
    return note if len(lacking) == len(records) else joined((html_table(caption, table), note))


def _with_plan(records: Sequence[RunRecord]) -> list[tuple[int, RunRecord]]:
    return [(place, record) for place, record in enumerate(records) if record.plan is not None]
