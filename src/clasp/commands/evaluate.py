"""``clasp eval``: evaluate a model on a task.

Input: model, task and options as typed. Output: results, which are also appended to ``results.jsonl`` in the run folder
or in the folder that the user names, and a figure there where the task has one. Note: the tasks are in
``clasp.evaluation.registry``; here only ``TASK_FIGURES`` depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from clasp.commands.evaluated_model import ModelSource, find_model
from clasp.commands.result_folder import ResultFolder
from clasp.commands.saved_predictions import save_predictions
from clasp.commands.training_overlap import training_overlap
from clasp.config.datasets import open_pairs_for_settings
from clasp.data.formats.setting_hints import OPTION_HINTS
from clasp.data.missing_images import require_images
from clasp.data.pairs import ColumnNames, Pairs
from clasp.evaluation.equal_items import require_different_images
from clasp.evaluation.identity import EvaluationIdentity, identify
from clasp.evaluation.registry import EVALUATION_TASKS, TaskEntry, find_task, parse_task_options
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.task_context import LoadedModel, TaskContext
from clasp.evaluation.tasks import EvaluationTask, ScoredQueries
from clasp.report.console import relative_path
from clasp.report.evaluation_files import evaluation_file
from clasp.report.figures import draw_retention
from clasp.report.prediction_sheets import PREDICTION_SHEETS
from clasp.training.unfinished import unfinished_lines
from clasp.types import MessageCallback, ProgressFactory, UserError, no_progress_bar

TASK_FIGURES: dict[str, Callable[[Sequence[EvaluationResult], Path], None]] = {"retention": draw_retention}
"""Task to the figure of its results, ``RUN/TASK-DATA-ID.png``"""


def evaluate_run(
    model: str | Path,
    task: str,
    options: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    predictions: bool = False,
    say: MessageCallback = lambda line: None,
    bar: ProgressFactory = no_progress_bar,
) -> list[EvaluationResult]:
    """Run a task of ``EVALUATION_TASKS``, or ``package.module:Name``, on a model; ``options`` are ``key=value``.

    ``model`` as ``find_model`` takes it; ``out``: the folder for the results, in place of the run's own;
    ``predictions``: also keep those of single queries, with pictures. ``say`` is called with status lines beside the
    results. Raises ``UserError``.
    """
    entry = find_task(task)
    given = parse_task_options(task, entry, options)
    if predictions:
        require_single_queries(task, entry, "keep")
    source = find_model(model)
    require_task_applies(task, entry, source)
    folder = ResultFolder(source, out)
    pairs = pair_opener(source, entry, given)(given["data"])

    @cache
    def load() -> LoadedModel:
        loaded = source.load(bar)
        folder.require_fingerprint(loaded.encoder.fingerprint)
        return loaded

    context = make_context(source, load, pairs, entry, given, say, bar)
    identity = identify(task, entry, context)
    queries = _score_queries(entry, context) if predictions else None
    results = entry.run(context) if queries is None else queries[0].finish(queries[1])
    if not isinstance(results, list) or not all(isinstance(result, EvaluationResult) for result in results):
        raise UserError(f"task {task!r} returned {type(results).__name__}; a list of EvaluationResult is expected")
    results = identity.recorded_in(results)
    folder.record(results, say)
    if queries is not None:
        _keep_predictions(*queries, context, identity, folder.path)
    if task in TASK_FIGURES:
        figure = folder.path / f"{evaluation_file(task, context.data, identity.id)}.png"
        TASK_FIGURES[task](results, figure)
        say(f"figure: {relative_path(figure)}")
    for line in (*unfinished_lines(source.run), *training_overlap(source.run, source.name, {"": pairs})):
        say(line)
    return results


def _score_queries(entry: TaskEntry, context: TaskContext) -> tuple[EvaluationTask, list[ScoredQueries]]:
    assert entry.build is not None
    task = entry.build(context)
    return task, task.scored(context.model)


def _keep_predictions(
    task: EvaluationTask,
    scored: Sequence[ScoredQueries],
    context: TaskContext,
    identity: EvaluationIdentity,
    folder: Path,
) -> None:
    """The prediction of each query goes to ``folder``, with a picture of some."""
    context.say(f"predictions: {relative_path(save_predictions(folder, task, scored, context.pairs, identity))}")
    if task.name in PREDICTION_SHEETS and len(scored) == 1:  # folds have a picture each, and no file of its own
        sheet = folder / f"{evaluation_file(task.name, task.data, identity.id)}.png"
        PREDICTION_SHEETS[task.name](context.pairs, scored[0].scores, sheet)
        context.say(f"pictures: {relative_path(sheet)}")


def require_single_queries(task: str, entry: TaskEntry, what: str) -> None:
    """Raises ``UserError`` for a task without scores of single queries, which are to ``what`` (compare, keep)."""
    if entry.build is None:
        known = ", ".join(name for name, each in EVALUATION_TASKS.items() if each.build is not None)
        raise UserError(f"{task} has no scores of single queries to {what}; tasks: {known}")


def require_task_applies(task: str, entry: TaskEntry, model: ModelSource) -> None:
    """Raises ``UserError`` for a task on the towers of a run, and a model that is not a run."""
    if entry.needs_run and model.run is None:
        raise UserError(f"{task} evaluates the towers of a run folder, and {model.name} is not one")


def pair_opener(model: ModelSource, entry: TaskEntry, options: Mapping[str, str]) -> Callable[[str], Pairs]:
    """Opens pairs by name, with the columns of the options. Raises ``UserError`` for images of which too many are
    missing, or all are the same where the task needs different ones."""
    columns = ColumnNames(image=options.get("image", ""), caption=options.get("caption", ""))
    root = options.get("image_root")

    def open_named(name: str) -> Pairs:
        pairs = open_pairs_for_settings(name, model.data, columns=columns, image_root=root, hints=OPTION_HINTS)
        if model.reads_images:
            require_images(OPTION_HINTS, pairs, max_bad_fraction=model.data.max_bad_fraction)
            if entry.needs_different_images:
                require_different_images(pairs, name)
        return pairs

    return open_named


def make_context(
    source: ModelSource,
    load: Callable[[], LoadedModel],
    pairs: Pairs,
    entry: TaskEntry,
    options: Mapping[str, str],
    say: MessageCallback,
    bar: ProgressFactory,
) -> TaskContext:
    """The arguments of a task; ``load``: the model of ``source``. Lines on the pairs are said once the model is loaded:
    an error before that stands alone."""
    waiting: list[str] | None = []

    def say_when_loaded(line: str) -> None:
        say(line) if waiting is None else waiting.append(line)

    def load_and_say() -> LoadedModel:
        nonlocal waiting
        loaded = load()
        lines, waiting = waiting or [], None
        for line in lines:
            say(line)
        return loaded

    return TaskContext(
        name=source.name,
        load=load_and_say,
        pairs=pairs,
        open_pairs=pair_opener(source, entry, options),
        options=options,
        run=source.trained,
        say=say_when_loaded,
        bar=bar,
    )
