"""The evaluation tasks by name, each with its options: what ``clasp eval MODEL TASK key=value …`` can be given.

Input: a name and the options as typed. Output: the ``TaskEntry`` and its parsed options. A task is one function and one
line in ``EVALUATION_TASKS``: ``(TaskContext) -> EvaluationTask`` where it scores single queries, so that two models can
be compared on them, else ``(TaskContext) -> list[EvaluationResult]``. One that is not built in is named
``package.module:Name``, where ``Name`` is a ``TaskEntry``. Note: nothing heavy is imported before a task runs, since
the help of ``clasp eval`` is made of this table.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from clasp.errors import UserError
from clasp.evaluation.options import PAIR_OPTIONS, TaskOption, describe_option, parse_options

if TYPE_CHECKING:
    from clasp.evaluation.results import EvaluationResult
    from clasp.evaluation.task_context import TaskContext
    from clasp.evaluation.tasks import EvaluationTask


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A task: the function that runs it, one line about it, and the options it has beside ``PAIR_OPTIONS``.

    ``needs_run``: it evaluates the towers of a run, and no other model. ``build``: the task whose ``results`` are those
    of ``run``; ``None`` where it has no scores of single queries. ``needs_different_images``: images are compared with
    each other or with the texts of others, so that pairs whose images are all the same are refused.
    """

    run: Callable[[TaskContext], list[EvaluationResult]]
    help: str
    options: tuple[TaskOption, ...] = ()
    needs_run: bool = False
    build: Callable[[TaskContext], EvaluationTask] | None = None
    needs_different_images: bool = True

    @classmethod
    def of_queries(
        cls,
        build: Callable[[TaskContext], EvaluationTask],
        help: str,
        options: tuple[TaskOption, ...] = (),
        *,
        needs_different_images: bool = True,
    ) -> TaskEntry:
        """A task that scores single queries."""

        def run(context: TaskContext) -> list[EvaluationResult]:
            return build(context).results(context.model)

        return cls(run, help, options, build=build, needs_different_images=needs_different_images)

    @property
    def all_options(self) -> tuple[TaskOption, ...]:
        """``data`` first, then the task's own, then those on how ``data`` is read."""
        data, *reading = PAIR_OPTIONS
        return (data, *self.options, *reading)


# --- the tasks -------------------------------------------------------------------------------------------------------


def _deferred(path: str) -> Callable[[TaskContext], Any]:
    """The function ``module:name`` of this room, imported when it is called."""

    def call(context: TaskContext) -> Any:
        module, _, name = path.partition(":")
        return getattr(importlib.import_module(f"clasp.evaluation.{module}"), name)(context)

    return call


_LABEL_HELP = "column of the class"
_LABELS_HELP = "column of the list of classes"
_FIT_HELP = "pairs to fit on; about half of data, by a hash, if left out"
_LANGUAGES_HELP = "some of the languages of the captions, separated by commas; all if left out"

_ZEROSHOT_OPTIONS = (
    TaskOption("classes", "file with one class name a line; the classes of data if left out", names="file"),
    TaskOption(
        "templates",
        "prompt with {} for the class, a file of them (lines or JSON), clip-80, clip-7",
        "a photo of a {}.",
        names="file",
    ),
    TaskOption(
        "descriptions",
        "JSON file {class: [texts]}: prompts of each class, in place of templates",
        in_place_of="templates",
        names="file",
    ),
)

EVALUATION_TASKS: dict[str, TaskEntry] = {
    "zeroshot": TaskEntry.of_queries(
        _deferred("zeroshot_task:build_zeroshot"),
        "classify images by class names alone",
        (*_ZEROSHOT_OPTIONS, TaskOption("label", _LABEL_HELP, "class")),
    ),
    "retrieval": TaskEntry.of_queries(
        _deferred("caption_tasks:build_retrieval"),
        "find captions by image and images by caption",
        (TaskOption("folds", "within so many consecutive parts of the images, and the mean: 5 for COCO's 1K test"),),
    ),
    "multilingual": TaskEntry.of_queries(
        _deferred("caption_tasks:build_multilingual"),
        "retrieval in each language, and its mean",
        (TaskOption("languages", _LANGUAGES_HELP),),
    ),
    "multilingual_zeroshot": TaskEntry.of_queries(
        _deferred("language_classes:language_classes_task"),
        "zeroshot in each language, of the classes with a name there, as in Babel-ImageNet",
        (
            TaskOption("classes", "JSON file {language: [[class numbers], [names]]}", required=True, names="file"),
            TaskOption("templates", "as for zeroshot, or a JSON file {language: [templates]}", "{}", names="file"),
            TaskOption("label", "column of the class number", "label"),
            TaskOption("languages", _LANGUAGES_HELP),
        ),
    ),
    "multilabel": TaskEntry(
        _deferred("multilabel_task:evaluate_multilabel"),
        "classify images of several classes: mean average precision, mean area under the ROC curve",
        (*_ZEROSHOT_OPTIONS, TaskOption("label", _LABELS_HELP, "classes")),
    ),
    "knn": TaskEntry.of_queries(
        _deferred("probe_tasks:knn_task"),
        "classify images by their nearest neighbours among image embeddings",
        (
            TaskOption("fit", _FIT_HELP, names="pairs"),
            TaskOption("label", _LABEL_HELP, "class"),
            TaskOption("k", "number of neighbours", "20"),
            TaskOption("temperature", "a neighbour weighs exp(cosine / temperature)", "0.07"),
        ),
    ),
    "probe": TaskEntry.of_queries(
        _deferred("probe_tasks:linear_task"),
        "classify images by logistic regression on image embeddings",
        (
            TaskOption("fit", _FIT_HELP, names="pairs"),
            TaskOption("label", _LABEL_HELP, "class"),
            TaskOption("shots", "fit to so many images of each class; to all if left out"),
            TaskOption("draws", "with shots: average over so many draws of them", "3"),
        ),
    ),
    "multilabel_probe": TaskEntry(
        _deferred("multilabel_task:evaluate_multilabel_probe"),
        "the same by logistic regression on image embeddings",
        (
            TaskOption("fit", "pairs to fit on", required=True, names="pairs"),
            TaskOption("label", _LABELS_HELP, "classes"),
        ),
    ),
    "robustness": TaskEntry(
        _deferred("robustness_task:evaluate_robustness"),
        "zeroshot on images with corruptions of ImageNet-C, made as they are read",
        (
            *_ZEROSHOT_OPTIONS,
            TaskOption("label", _LABEL_HELP, "class"),
            TaskOption("corruptions", "names separated by commas: gaussian_noise, jpeg_compression, …", "all"),
            TaskOption("severities", "numbers from 1 to 5, separated by commas", "3"),
        ),
    ),
    "sugarcrepe": TaskEntry.of_queries(
        _deferred("caption_tasks:build_sugarcrepe"),
        "choose the caption of an image among hard negatives",
        (TaskOption("negative", "column of the negative captions, a text or a list", "negative_caption"),),
        needs_different_images=False,
    ),
    "winoground": TaskEntry.of_queries(
        _deferred("caption_tasks:build_winoground"),
        "match two images with two captions, the pairs of a group: group, text and image score",
    ),
    "retention": TaskEntry(
        _deferred("retention.run:evaluate_retention"),
        "pre-trained features of each tower before and after alignment; figure in RUN",
        (
            TaskOption(
                "fit", "pairs to fit the image probes on; about half of data, by a hash, if left out", names="pairs"
            ),
            TaskOption("label", f"{_LABEL_HELP}; class if left out"),
            TaskOption("anchor", "language that captions are compared with; en if left out"),
            TaskOption("languages", _LANGUAGES_HELP),
        ),
        needs_run=True,
    ),
}


# --- by name ---------------------------------------------------------------------------------------------------------


def find_task(name: str) -> TaskEntry:
    """The built-in task with this name, or the ``TaskEntry`` at ``package.module:Name``.

    A module may lie in the current folder. Raises ``UserError`` for an unknown name, module or object, and for an
    object that is not a ``TaskEntry``; errors inside the module are not caught.
    """
    from clasp.data.formats.setting_hints import suggest_key

    if name in EVALUATION_TASKS:
        return EVALUATION_TASKS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        near = get_close_matches(name, EVALUATION_TASKS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = ", ".join((*EVALUATION_TASKS, "package.module:Name"))
        data = suggest_key(name, ("zeroshot data",), ())
        raise UserError(f"unknown task {name!r}{data}; {hint}tasks: {known}")
    names = vars(_import_module(name, module))
    if isinstance(entry := names.get(attribute), TaskEntry):
        return entry
    entries = [key for key, value in names.items() if isinstance(value, TaskEntry)]
    what = "no such name" if attribute not in names else f"a {type(names[attribute]).__name__}"
    raise UserError(
        f"task {name!r}: {attribute!r} is {what} in {module}; it must be a clasp.evaluation.registry.TaskEntry; "
        f"there: {', '.join(entries) or 'none'}"
    )


def _import_module(name: str, module: str) -> object:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it cannot shadow installed packages
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks another
        raise UserError(f"task {name!r}: {error}; it is looked for in the current folder and on PYTHONPATH") from None
    except (ValueError, TypeError):
        raise UserError(f"task {name!r} is not package.module:Name") from None


def check_task(name: str, typed: Sequence[str]) -> None:
    """Raises ``UserError`` for an unknown task and for options that it does not take, before torch is imported."""
    parse_task_options(name, find_task(name), typed)


def parse_task_options(name: str, entry: TaskEntry, typed: Sequence[str]) -> dict[str, str]:
    """The options of a task, as ``parse_options`` reads them."""
    return parse_options(name, entry.all_options, typed)


def used_options(entry: TaskEntry, given: Mapping[str, str]) -> dict[str, str]:
    """The options of ``parse_task_options`` without ``data``, and without those that another one replaces."""
    replaced = {option.in_place_of for option in entry.options if option.name in given}
    return {name: value for name, value in given.items() if name != PAIR_OPTIONS[0].name and name not in replaced}


def changed_options(task: str, options: Mapping[str, str]) -> list[str]:
    """Those of ``used_options`` that are not at their default, as typed; all of a task that is not built in."""
    known = EVALUATION_TASKS[task].all_options if task in EVALUATION_TASKS else ()
    defaults = {option.name: option.default for option in known}
    return [f"{name}={value}" for name, value in options.items() if value != defaults.get(name)]


def task_names() -> str:
    """All names, for help."""
    return " | ".join((*EVALUATION_TASKS, "package.module:Name"))


def describe_tasks() -> list[str]:
    """Every task and its options, a line each, for help."""
    lines = []
    for name, entry in EVALUATION_TASKS.items():
        lines.append(f"{name}: {entry.help}")
        lines += [describe_option(option) for option in entry.options]
    return [*lines, "every task:", *map(describe_option, PAIR_OPTIONS)]
