"""Tables that compare runs: what was reached, what differs between the recipes, parameters, results, cost, facts.

Input: ``RunRecord``s. Output: ``AnnotatedTable``s of plain strings, which the caller renders. Note: a run that lacks a
number has a dash in its place, and no number is estimated. Long, since all tables share the functions of their cells.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clasp.errors import counted
from clasp.evaluation.language_sets import macro_set
from clasp.evaluation.results import EvaluationResult
from clasp.report.evaluation_labels import (
    EvaluationKey,
    evaluation_key,
    evaluation_label,
    evaluation_labels,
    latest_results,
)
from clasp.report.run_record import RunRecord
from clasp.report.tables import (
    CHANCE_TITLE,
    INTERVAL_TITLE,
    AnnotatedTable,
    LabelledResult,
    few_queries,
    format_interval,
    format_metric,
    labelled_by_task,
    main_metric,
    metric_title,
)
from clasp.training.cost.ledger import RunCost, format_si

NONE = "–"
"""In the place of a number that is not there"""
RETENTION = "retention/"
_PARTS = {
    "model": "whole model",
    "image": "image tower",
    "text": "text tower",
    "shared": "in both towers",
    "heads": "heads",
    "scale": "logit scale and bias",
}


@dataclass(frozen=True, slots=True)
class ComparedResults:
    """The results of one evaluation (a task, its options and pairs) with one kind of metrics, by run (index) that has
    any. ``results``: also those that are no row, all directions of a language."""

    task: str
    label: str
    results: Sequence[EvaluationResult]
    rows: Mapping[int, Sequence[LabelledResult]]

    @property
    def title(self) -> str:
        return f"{self.task} on {self.label}"

    @property
    def metric(self) -> str:
        """The main metric."""
        return main_metric(next(iter(self.rows.values()))[0].result)

    @property
    def labels(self) -> list[str]:
        """Row labels in order, of all runs."""
        return list(dict.fromkeys(row.label for rows in self.rows.values() for row in rows))

    def result(self, run: int, label: str) -> EvaluationResult | None:
        """The result of a run in the row with this label."""
        return next((row.result for row in self.rows.get(run, ()) if row.label == label), None)


def overview_table(records: Sequence[RunRecord]) -> AnnotatedTable:
    """One row per run: its state, its primary metric, and what it took."""
    columns = ("run", "state", "primary metric", "value", INTERVAL_TITLE, CHANCE_TITLE, "trained", "%", "s", "Wh")
    rows = [[record.label, record.state, *_primary_cells(record.primary), *_cost_cells(record)] for record in records]
    notes = [
        "Metric in per cent, with its 95 % interval and chance level. Trained: parameters, and their share of all. "
        "s: seconds in all stages. Wh: energy, where it was measured."
    ]
    return AnnotatedTable(columns, rows, notes)


def difference_tables(records: Sequence[RunRecord]) -> tuple[AnnotatedTable, AnnotatedTable]:
    """The recipe keys in which the runs differ, with their values: those that all runs have, and those of some."""
    settings = [record.settings for record in records]
    keys = dict.fromkeys(key for each in settings for key in each)
    of_all = [key for key in keys if all(key in each for each in settings)]
    differing = [key for key in of_all if any(each[key] != settings[0][key] for each in settings)]
    rows = [[key, *_brief_settings([each[key] for each in settings])] for key in differing]
    partial = [
        [key, *(format_setting(each[key]) if key in each else "not set" for each in settings)]
        for key in keys
        if key not in of_all
    ]
    columns = ("key", *_labels(records))
    same = f"Equal in all runs: {counted(len(of_all) - len(differing), 'other key')}."
    return AnnotatedTable(columns, rows, [same]), AnnotatedTable(columns, partial)


def recipe_table(record: RunRecord) -> AnnotatedTable:
    """Every key of a recipe."""
    return AnnotatedTable(("key", "value"), [[key, format_setting(value)] for key, value in record.settings.items()])


def parameter_table(records: Sequence[RunRecord]) -> AnnotatedTable:
    """Trained of all parameters by part, one column per run with a record of its cost."""
    known = [record.cost.parameters if record.cost else {} for record in records]
    parts = [part for part in _PARTS if any(part in counts for counts in known)]
    rows = [[_PARTS[part], *(_parameter_cell(counts.get(part)) for counts in known)] for part in parts]
    return AnnotatedTable(("part", *_labels(records)), rows, ["Trained of all parameters, and the percentage."])


def cost_table(records: Sequence[RunRecord]) -> AnnotatedTable:
    """The cost ledger: one row per measure, one column per run."""
    costs = [record.cost for record in records]
    stages = dict.fromkeys(stage for cost in costs if cost for stage in cost.seconds)
    rows = [[title, *(NONE if cost is None else measure(cost) for cost in costs)] for title, measure in _COST.items()]
    for stage in stages:
        spent = [NONE if cost is None else f"{cost.seconds.get(stage, 0.0):,.1f}" for cost in costs]
        rows.append([f"seconds: {stage}", *spent])
    measured = {
        f"{record.label}, {what}: {how}"
        for record in records
        if record.cost
        for what, how in (("peak memory", record.cost.sessions[-1].peak), ("energy", record.cost.sessions[-1].energy))
    }
    frozen = [
        f"{record.label}, once and cached: {once.what}, {format_si(once.flops, 'FLOP')} an input"
        for record in records
        if record.cost
        for once in record.cost.once.values()
    ]
    return AnnotatedTable(("measure", *_labels(records)), rows, [*frozen, *sorted(measured)])


def facts_table(records: Sequence[RunRecord]) -> AnnotatedTable:
    """What the model card has beside numbers: towers and their weights, pairs, seed, precision."""
    rows = [[title, *(fact(record) or NONE for record in records)] for title, fact in _FACTS.items()]
    return AnnotatedTable(("fact", *_labels(records)), rows)


# --- results ---------------------------------------------------------------------------------------------------------


def compare_results(records: Sequence[RunRecord]) -> list[ComparedResults]:
    """The results of all runs but retention, by evaluation."""
    runs = [
        [each for each in latest_results(record.results) if not each.task.startswith(RETENTION)] for record in records
    ]
    labels = evaluation_labels([each for results in runs for each in results])
    found: dict[tuple[EvaluationKey, tuple[str, ...]], dict[int, list[LabelledResult]]] = {}
    of_key: dict[EvaluationKey, list[EvaluationResult]] = {key: [] for key in labels}
    for run, results in enumerate(runs):
        for key in dict.fromkeys(map(evaluation_key, results)):
            own = [each for each in results if evaluation_key(each) == key]
            of_key[key] += own
            for task, rows in labelled_by_task(own):
                label = evaluation_label(own[0])  # the title has it
                titled = [row._replace(label=task) if row.label == label else row for row in rows]
                found.setdefault((key, tuple(rows[0].result.metrics)), {}).setdefault(run, []).extend(titled)
    return [ComparedResults(key.task, labels[key], of_key[key], rows) for (key, _), rows in found.items()]


def comparison_table(compared: ComparedResults, records: Sequence[RunRecord]) -> AnnotatedTable:
    """The main metric of every run, row by row, with its 95 % interval; and the chance level."""
    name = compared.metric
    columns = (f"{metric_title(name)}, per cent", *(records[run].label for run in compared.rows), CHANCE_TITLE)
    rows, counts = [], set()
    for label in compared.labels:
        results = [compared.result(run, label) for run in compared.rows]
        there = [result for result in results if result is not None]
        counts.add(len({result.n for result in there}))
        chance = dict.fromkeys(format_metric(name, r.chance[name]) for r in there if name in r.chance)
        rows.append([label, *(_value_cell(name, result) for result in results), " / ".join(chance)])
    notes = [
        *few_queries(compared.results),
        "In brackets: the 95 % interval of each run alone, not of the difference between runs.",
    ]
    if counts - {1}:
        notes.append("The runs were evaluated on different numbers of queries: their values are not comparable.")
    return AnnotatedTable(columns, rows, notes)


# --- cells -----------------------------------------------------------------------------------------------------------


def format_setting(value: Any) -> str:
    """A value of a recipe: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _brief_settings(values: Sequence[Any]) -> list[str]:
    """As ``format_setting``, long floats to four digits unless values that differ would be equal; the exact ones are in
    the table of the run."""
    exact = [format_setting(value) for value in values]
    brief = [
        f"{value:.4g}" if isinstance(value, float) and len(repr(value)) > 8 else text
        for value, text in zip(values, exact, strict=True)
    ]
    return brief if len(set(brief)) == len(set(exact)) else exact


def title_with_languages(metric: str, language: str) -> str:
    """The title of a metric with its language or set of languages: ``mean recall over all languages``."""
    if not language:
        return metric_title(metric)
    languages = macro_set(language)
    return f"{metric_title(metric)} {f'in {language}' if languages is None else f'over {languages} languages'}"


def percent_interval(result: EvaluationResult, metric: str) -> tuple[float, float] | None:
    """The 95 % interval of a metric in per cent; ``None`` where it has none, or one without finite ends."""
    interval = result.interval.get(metric)
    if interval is None or not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return None
    return 100 * interval.low, 100 * interval.high


def total_seconds(record: RunRecord) -> float | None:
    """Seconds in all stages and sessions of a run; ``None`` where they were not recorded."""
    return None if record.cost is None else sum(record.cost.seconds.values())


def _labels(records: Sequence[RunRecord]) -> list[str]:
    return [record.label for record in records]


def _primary_cells(primary: EvaluationResult | None) -> list[str]:
    if primary is None:
        return ["not evaluated", NONE, "", ""]
    name = main_metric(primary)
    title = title_with_languages(name, primary.language)
    chance = format_metric(name, primary.chance[name]) if name in primary.chance else ""
    where = f"{title} ({primary.task.partition('/')[0]} on {evaluation_label(primary)})"
    return [
        where,
        format_metric(name, primary.metrics[name]),
        format_interval(name, primary.interval.get(name)),
        chance,
    ]


def _cost_cells(record: RunRecord) -> list[str]:
    cost, seconds = record.cost, total_seconds(record)
    if cost is None or seconds is None:
        return [NONE] * 4
    whole = cost.parameters["model"]
    return [f"{whole['trained']:,}", f"{trained_percent(cost):.2f}", f"{seconds:,.0f}", _energy(cost)]


def trained_percent(cost: RunCost) -> float:
    """Trained parameters, per cent of all."""
    whole = cost.parameters["model"]
    return 100 * whole["trained"] / whole["total"]


def _parameter_cell(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return NONE
    share = 100 * counts["trained"] / counts["total"] if counts["total"] else 0.0
    return f"{counts['trained']:,} of {counts['total']:,} ({share:.2f} %)"


def _value_cell(name: str, result: EvaluationResult | None) -> str:
    if result is None:
        return NONE
    between = format_interval(name, result.interval.get(name))
    return format_metric(name, result.metrics[name]) + (f" ({between})" if between else "")


def _energy(cost: RunCost) -> str:
    return NONE if cost.energy_kwh is None else f"{1000 * cost.energy_kwh:.3g}"


def _flops(flops: float | None) -> str:
    return NONE if flops is None else format_si(flops, "FLOP")


def _peak(cost: RunCost) -> str:
    return NONE if cost.peak_bytes is None else format_si(cost.peak_bytes, "B")


def _machine(cost: RunCost) -> str:
    at = cost.sessions[-1].machine
    return f"{at['gpu'] or at['cpu']}, {at['threads']} of {counted(at['cores'], 'core')}, torch {at['torch']}"


_COST: Mapping[str, Callable[[RunCost], str]] = {
    "sessions": lambda cost: f"{len(cost.sessions):,}",
    "gradient steps": lambda cost: f"{sum(session.steps for session in cost.sessions):,}",
    "pairs seen": lambda cost: f"{sum(session.pairs for session in cost.sessions):,}",
    "forward pass, a pair": lambda cost: _flops(cost.forward_flops),
    "backward pass, a pair": lambda cost: _flops(cost.backward_flops),
    "peak memory": _peak,
    "pairs/s in a step": lambda cost: NONE if cost.pairs_per_second is None else f"{cost.pairs_per_second:,.1f}",
    "energy, Wh": _energy,
    "delta": lambda cost: NONE if cost.delta_bytes is None else format_si(cost.delta_bytes, "B"),
    "machine": _machine,
}


def _tower(record: RunRecord, side: str) -> str:
    if record.base is None:
        return str(record.settings.get(f"{side}.tower", ""))
    about = record.base[side]
    return f"{about['tower']}, {about['version']}, weights {about['fingerprint'][:12]}"


def _setting(record: RunRecord, key: str) -> str:
    return format_setting(record.settings[key]) if key in record.settings else ""


def _validation(record: RunRecord) -> str:
    share = record.settings.get("data.val_fraction")
    return _setting(record, "data.val") or (
        "" if share is None else f"{100 * share:g} % of the groups of the training pairs"
    )


_FACTS: Mapping[str, Callable[[RunRecord], str]] = {
    "folder": lambda record: str(record.path),
    "image tower": lambda record: _tower(record, "image"),
    "text tower": lambda record: _tower(record, "text"),
    "tuning of the image tower": lambda record: _setting(record, "tune.image"),
    "tuning of the text tower": lambda record: _setting(record, "tune.text"),
    "heads": lambda record: _setting(record, "head.kind"),
    "dimensions of the joint space": lambda record: _setting(record, "head.width"),
    "training pairs": lambda record: _setting(record, "data.train"),
    "validation pairs": _validation,
    "seed": lambda record: _setting(record, "train.seed"),
    "precision": lambda record: str(record.last_event("start").get("precision", "")),
    "samples that could not be read": lambda record: str(sum(e["event"] == "skipped" for e in record.events) or ""),
}
