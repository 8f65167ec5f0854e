"""Evaluations by name: a run, a task and a few options become rows of results.

In goes what was typed after ``clasp eval RUN TASK``; out come results, which are also kept in the run.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clasp.config.build import ModelAndPreprocessing, build_feature_source, load
from clasp.config.datasets import open_pairs_for_recipe
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.data.pairs import ColumnNames, Pairs, caption_languages
from clasp.evaluation.from_pairs import multilingual_task, retrieval_task, zeroshot_task
from clasp.evaluation.queries import read_class_names
from clasp.evaluation.retention.run import RETENTION_OPTIONS as RETENTION_OPTIONS
from clasp.evaluation.retention.run import evaluate_retention
from clasp.evaluation.tasks import EvaluationResult
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.report.figures import draw_retention
from clasp.training.run_folder import RunFolder
from clasp.types import MessageCallback, ProgressFactory, UserError, no_progress_bar

TaskOptions = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """A run, the pairs it is asked about, and how it was asked: what any task may need."""

    run: Path
    recipe: Recipe
    model: DualEncoder
    pairs: Pairs
    inputs: FeatureSource
    options: TaskOptions
    say: MessageCallback
    bar: ProgressFactory


def evaluate_run(
    run: str | Path,
    task: str,
    options: Sequence[str] = (),
    *,
    say: MessageCallback = lambda line: None,
    bar: ProgressFactory = no_progress_bar,
) -> list[EvaluationResult]:
    """Ask ``task`` of a run. Options are ``key=value``; see each function below. Raises ``UserError``.

    ``say`` hears what a person should know beside the results.
    """
    if task not in EVALUATION_TASKS:
        near = difflib.get_close_matches(task, EVALUATION_TASKS, n=1)
        raise UserError(
            f"unknown task {task!r}; {f'did you mean {near[0]}? ' if near else ''}tasks: {', '.join(EVALUATION_TASKS)}"
        )
    ask, known = EVALUATION_TASKS[task]
    given = _parse_options(task, options, known)
    if "data" not in given:
        raise UserError(f"{task} needs data=FOLDER or data=PAIRS; options: {', '.join(known)}")
    recipe = recipe_from_dict(RunFolder(run).recipe(), str(run))
    columns = ColumnNames(image=given.get("image", ""), caption=given.get("caption", ""))
    pairs = open_pairs_for_recipe(given["data"], recipe, columns=columns, image_root=given.get("image_root"))
    model = load(run)
    assert isinstance(model.encoder, DualEncoder)
    inputs = build_feature_source(
        ModelAndPreprocessing(model.encoder, model.transform, model.tokenizer), recipe, bar=bar
    )
    results = ask(
        TaskContext(
            run=Path(run),
            recipe=recipe,
            model=model.encoder,
            pairs=pairs,
            inputs=inputs,
            options=given,
            say=say,
            bar=bar,
        )
    )
    RunFolder(run).append("results.jsonl", [asdict(result) for result in results])
    return results


def run_zeroshot(context: TaskContext) -> list[EvaluationResult]:
    """``data``: class folders, or pairs with their class in ``class`` or another column (``label=``); ``classes``: a
    file with one class a line; ``templates``: a file with one a line, a JSON list, or one template with ``{}``."""
    pairs, options = context.pairs, context.options
    label = options.get("label", "class")
    for pair in pairs:
        if label not in pair.meta:
            has = ", ".join(map(str, pair.meta)) or "none"
            raise UserError(
                f"{pair.id} of {options['data']} has no column {label!r} with its class; label= one of: {has}"
            )
    classes = (
        read_class_names(Path(options["classes"]))
        if "classes" in options
        else sorted({str(p.meta[label]) for p in pairs})
    )
    templates = _read_templates(options.get("templates", "a photo of a {}."))
    task = zeroshot_task(pairs, context.inputs, classes=classes, templates=templates, data=options["data"], label=label)
    return task.results(context.model)


def run_retrieval(context: TaskContext) -> list[EvaluationResult]:
    """``data``: pairs; all their captions are asked, in both directions."""
    return retrieval_task(context.pairs, context.inputs, data=context.options["data"]).results(context.model)


def run_multilingual(context: TaskContext) -> list[EvaluationResult]:
    """``data``: pairs whose captions name their language; ``languages``: some of them, separated by commas."""
    pairs, options = context.pairs, context.options
    spoken = caption_languages(pairs)
    wanted = options["languages"].split(",") if "languages" in options else spoken
    odd = [language for language in wanted if language not in spoken]
    if odd or not spoken:
        lacking = ", ".join(odd) or "a language it names"
        raise UserError(f"no caption of {options['data']} is in {lacking}; it has {', '.join(spoken) or 'none'}")
    return multilingual_task(pairs, context.inputs, languages=wanted, data=options["data"]).results(context.model)


def run_retention(context: TaskContext) -> list[EvaluationResult]:
    """``data``: pairs with a class, or with captions in several languages, or with several captions; see
    ``evaluate_retention``."""
    rows = evaluate_retention(
        context.run,
        context.recipe,
        context.model,
        context.pairs,
        context.inputs,
        context.options,
        say=context.say,
        bar=context.bar,
    )
    figure = context.run / "retention.png"
    draw_retention(rows, figure, title=f"Retention of pre-trained features: {context.run.name}")
    context.say(f"figure: {figure}")
    return rows


EVALUATION_TASKS: dict[str, tuple[Callable[[TaskContext], list[EvaluationResult]], tuple[str, ...]]] = {
    "zeroshot": (run_zeroshot, ("data", "classes", "templates", "label", "image", "caption", "image_root")),
    "retrieval": (run_retrieval, ("data", "image", "caption", "image_root")),
    "multilingual": (run_multilingual, ("data", "languages", "image", "caption", "image_root")),
    "retention": (run_retention, RETENTION_OPTIONS),
}


def _parse_options(task: str, options: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    given = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                f"{task}: {option!r} is not an option; {f'did you mean {near[0]}=…? ' if near else ''}"
                f"it takes {', '.join(known)}"
            )
        given[key] = value
    return given


def _read_templates(given: str) -> list[str]:
    text = given.strip()
    if text.startswith(('["', "['")) or (text.startswith("[") and text.endswith("]")):
        try:
            templates = json.loads(given)
        except ValueError as error:
            raise UserError(f"templates={given} is not a JSON list: {error}") from None
        if not templates or not all(isinstance(template, str) and template.strip() for template in templates):
            raise UserError(f'templates={given} must be a list of texts such as ["a photo of a {{}}.", "a {{}}."]')
        return templates
    if os.path.isfile(given):
        return [line for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [given]
