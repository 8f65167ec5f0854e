"""``clasp eval``: evaluate a run on a task.

Input: run, task and options as typed. Output: results, which are also appended to the run's ``results.jsonl``, and a
figure in the run folder where the task has one. Note: the tasks are in ``clasp.evaluation.registry``; here only
``TASK_FIGURES`` depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from clasp.config.build import ModelAndPreprocessing, build_feature_source, load
from clasp.config.datasets import open_pairs_for_recipe
from clasp.config.recipe import recipe_from_dict
from clasp.data.pairs import ColumnNames
from clasp.evaluation.registry import find_task, parse_task_options
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.task_context import TaskContext
from clasp.models.dual_encoder import DualEncoder
from clasp.report.console import relative_path
from clasp.report.figures import draw_retention
from clasp.training.run_folder import RunFolder
from clasp.types import MessageCallback, ProgressFactory, UserError, no_progress_bar

TASK_FIGURES: dict[str, Callable[[Sequence[EvaluationResult], Path], None]] = {"retention": draw_retention}
"""Task to the figure of its results, ``RUN/TASK.png``"""


def evaluate_run(
    run: str | Path,
    task: str,
    options: Sequence[str] = (),
    *,
    say: MessageCallback = lambda line: None,
    bar: ProgressFactory = no_progress_bar,
) -> list[EvaluationResult]:
    """Run a task of ``EVALUATION_TASKS``, or ``package.module:Name``, on a run; ``options`` are ``key=value``.

    ``say`` is called with status lines beside the results. Raises ``UserError``.
    """
    entry, folder = find_task(task), RunFolder(run)
    given = parse_task_options(task, entry, options)
    recipe = recipe_from_dict(folder.recipe(), str(run))
    columns = ColumnNames(image=given.get("image", ""), caption=given.get("caption", ""))
    pairs = open_pairs_for_recipe(given["data"], recipe, columns=columns, image_root=given.get("image_root"))
    model = load(run)
    assert isinstance(model.encoder, DualEncoder)
    parts = ModelAndPreprocessing(model.encoder, model.transform, model.tokenizer)
    context = TaskContext(
        run=folder.path,
        recipe=recipe,
        model=model.encoder,
        pairs=pairs,
        inputs=build_feature_source(parts, recipe, bar=bar),
        options=given,
        say=say,
        bar=bar,
    )
    results = entry.run(context)
    if not isinstance(results, list) or not all(isinstance(result, EvaluationResult) for result in results):
        raise UserError(f"task {task!r} returned {type(results).__name__}; a list of EvaluationResult is expected")
    folder.append("results.jsonl", [asdict(result) for result in results])
    if task in TASK_FIGURES:
        figure = folder.path / f"{task}.png"
        TASK_FIGURES[task](results, figure)
        say(f"figure: {relative_path(figure)}")
    return results
