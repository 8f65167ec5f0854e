"""The tasks on captions: ``retrieval``, ``multilingual``, ``sugarcrepe`` and ``winoground``.

Input: a ``TaskContext`` whose pairs have captions. Output: a task. Note: equal captions are said before an image is
read.
"""

from __future__ import annotations

from clasp.data.pairs import caption_languages
from clasp.evaluation.equal_items import equal_caption_lines
from clasp.evaluation.folded_retrieval import folded_retrieval_task
from clasp.evaluation.from_pairs import hard_negative_task, multilingual_task, retrieval_task, winoground_task
from clasp.evaluation.language_sets import requested_languages
from clasp.evaluation.task_context import TaskContext
from clasp.evaluation.tasks import EvaluationTask
from clasp.types import UserError


def build_retrieval(context: TaskContext) -> EvaluationTask:
    """All captions of the pairs, in both directions; within ``folds`` of them, where they are given."""
    for line in equal_caption_lines(context.pairs, context.data):
        context.say(line)
    if "folds" in context.options:
        folds = context.options["folds"]
        return folded_retrieval_task(context.pairs, context.inputs, folds=folds, data=context.data)
    return retrieval_task(context.pairs, context.inputs, data=context.data)


def build_multilingual(context: TaskContext) -> EvaluationTask:
    """Raises ``UserError`` where no caption names its language, or none is in a language that was asked for."""
    languages = requested_languages(context.options.get("languages"), caption_languages(context.pairs), context.data)
    if not languages:
        raise UserError(f"no caption of {context.data} names its language; evaluate them with: retrieval")
    for line in equal_caption_lines(context.pairs, context.data, languages):
        context.say(line)
    return multilingual_task(context.pairs, context.inputs, languages=languages, data=context.data)


def build_sugarcrepe(context: TaskContext) -> EvaluationTask:
    """The caption of each image against its hard negatives."""
    negative = context.options["negative"]
    return hard_negative_task(context.pairs, context.inputs, negative=negative, data=context.data)


def build_winoground(context: TaskContext) -> EvaluationTask:
    """Two images and two captions of each group."""
    return winoground_task(context.pairs, context.inputs, data=context.data)
