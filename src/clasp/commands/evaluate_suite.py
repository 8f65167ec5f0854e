"""``clasp eval MODEL --suite NAME``: one model on the data sets of a suite.

Input: a model, a suite, and the folder that has a folder for each data set. Output: a ``SuiteRow`` for each set;
results are appended to ``results.jsonl`` and predictions kept, as ``clasp eval`` does for one, and the card of a run
has the table of the suite. Note: sets that are missing are named before anything is computed, with where they are to be
had, and left out; a set that is there and cannot be read is an error. The model is loaded once, after the tasks that
score single queries are made of all sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clasp.commands.evaluate import make_context, pair_opener
from clasp.commands.evaluated_model import ModelSource, find_model
from clasp.commands.result_folder import ResultFolder
from clasp.commands.saved_predictions import save_predictions
from clasp.commands.training_overlap import training_overlap
from clasp.errors import counted
from clasp.evaluation.identity import identify
from clasp.evaluation.multilabel_task import read_class_lists
from clasp.evaluation.registry import EVALUATION_TASKS, parse_task_options
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.suites import MTEB_TASKS, PROMPTED_TASKS, SuiteSet, find_suite
from clasp.evaluation.task_context import LoadedModel, TaskContext
from clasp.evaluation.tasks import EvaluationTask, SingleTask
from clasp.report.suite_table import suite_table
from clasp.training.unfinished import unfinished_lines
from clasp.types import MessageCallback, ProgressFactory, UserError, no_progress_bar

_MadeTask = tuple[TaskContext, EvaluationTask | None]


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """A data set and its result; ``None`` where the set is missing."""

    set: SuiteSet
    result: EvaluationResult | None

    @property
    def value(self) -> float | None:
        """The metric of the benchmark, a fraction."""
        return None if self.result is None else self.result.metrics[self.set.metric]


def evaluate_suite(
    model: str | Path,
    suite: str,
    data: str | Path,
    *,
    templates: str | None = None,
    out: str | Path | None = None,
    say: MessageCallback = lambda line: None,
    bar: ProgressFactory = no_progress_bar,
) -> list[SuiteRow]:
    """Evaluate a model on a suite; ``templates``: for every set, in place of its own. Raises ``UserError``."""
    sets, folder = find_suite(suite), Path(data)
    if templates is not None and not templates.strip():
        raise UserError("templates= is empty; leave it out for those of each set")
    if templates is not None and not any(each.task in PROMPTED_TASKS for each in sets):
        raise UserError(f"templates={templates}: no set of {suite} has a task with templates")
    if not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder; it should have a folder for each set: {sets[0].name}, …")
    there = [each for each in sets if each.path(folder).exists()]
    missing = [each for each in sets if each not in there]
    if not there:
        names = ", ".join(each.name for each in sets)
        raise UserError(f"--data {folder} has none of the {len(sets)} sets of {suite}: {names}{_where(sets)}")
    for place in dict.fromkeys(map(_where_one, missing)):
        names = [f"{each.path(folder)}{f' of {each.name}' if each.folder else ''}" for each in missing]
        here = [name for name, each in zip(names, missing, strict=True) if _where_one(each) == place]
        say(f"missing: {', '.join(here)}{place}")
    if left := MTEB_TASKS.get(suite):
        tasks = f"{counted(len(left), 'task')} of {suite}"
        say(f"not here: {tasks} that mteb computes on clasp.as_mteb(RUN): {', '.join(left)}")
    source = find_model(model)
    results = ResultFolder(source, out)
    given = {each.name: _options(each, folder, templates) for each in there}

    @cache
    def load() -> LoadedModel:
        loaded = source.load(bar)
        results.require_fingerprint(loaded.encoder.fingerprint)
        return loaded

    made = _make_all(source, load, there, given, say, bar)
    load()
    opened = {name: context.pairs for name, (context, _) in made.items()}
    for line in (*unfinished_lines(source.run), *training_overlap(source.run, source.name, opened)):
        say(line)
    rows = {each.name: SuiteRow(each, None) for each in sets}
    for each in there:
        result = _evaluate(each, *made[each.name], results)
        rows[each.name] = SuiteRow(each, result)
        say(f"{each.name}: {each.metric} {result.metrics[each.metric]:.4g}, {result.seconds:,.0f} s")
    done = list(rows.values())
    table = suite_table([(row.set, row.result) for row in done], len(MTEB_TASKS.get(suite, ())))
    results.record_table(f"Suite {Path(suite).stem}", table, say)
    return done


def _where(sets: Sequence[SuiteSet]) -> str:
    """Where sets are to be had; empty if that is not known."""
    places = dict.fromkeys(each.source for each in sets if each.source)
    return f", to be had at {', '.join(places)}" if places else ""


def _where_one(each: SuiteSet) -> str:
    return _where([each])


def _options(each: SuiteSet, folder: Path, templates: str | None) -> dict[str, str]:
    return parse_task_options(each.task, EVALUATION_TASKS[each.task], each.options(folder, templates))


def _make_all(
    source: ModelSource,
    load: Callable[[], LoadedModel],
    sets: Sequence[SuiteSet],
    given: Mapping[str, Mapping[str, str]],
    say: MessageCallback,
    bar: ProgressFactory,
) -> dict[str, _MadeTask]:
    """Every set opened, with its task where that scores single queries; one ``UserError`` with all that cannot be
    evaluated: not opened, without the labels their task needs, pairs to fit on among them, or without the metric."""
    made, errors = dict[str, _MadeTask](), []
    for each in sets:
        options, entry = given[each.name], EVALUATION_TASKS[each.task]
        opener = pair_opener(source, entry, options)
        try:
            sides = {name: opener(name) for name in (options["data"], options.get("fit")) if name is not None}
            if each.task in ("multilabel", "multilabel_probe"):
                for name, pairs in sides.items():
                    read_class_lists(pairs, options["label"], name)
            context = make_context(source, load, sides[options["data"]], entry, options, say, bar)
            task = None if entry.build is None else entry.build(context)
            _require_metric(each, task)
            made[each.name] = context, task
        except UserError as error:
            errors.append(f"{each.name}: {error}")
    if errors:
        raise UserError("; ".join(errors))
    return made


def _require_metric(each: SuiteSet, task: EvaluationTask | None) -> None:
    """Raises ``UserError`` for a metric that the task has on other data: the area of two classes, with more of them."""
    if isinstance(task, SingleTask) and each.metric not in (known := task.queries.metric_names):
        raise UserError(f"{each.task} has no metric {each.metric!r} here; it has {', '.join(known)}")


def _evaluate(
    each: SuiteSet, context: TaskContext, task: EvaluationTask | None, folder: ResultFolder
) -> EvaluationResult:
    """The last result of the task, the mean over directions or languages where there are several; all are kept."""
    entry = EVALUATION_TASKS[each.task]
    identity = identify(each.task, entry, context)
    if task is None:
        results = identity.recorded_in(entry.run(context))
        folder.record(results, context.say)
    else:
        scored = task.scored(context.model)
        results = identity.recorded_in(task.finish(scored))
        folder.record(results, context.say)
        save_predictions(folder.path, task, scored, context.pairs, identity)
    return results[-1]
