"""The task ``zeroshot``: classification of images by class names alone.

Input: a ``TaskContext`` whose pairs have a class. Output: the task. Note: equal class names, and data in which every
image has a class of its own, are said before an image is read.
"""

from __future__ import annotations

from clasp.evaluation.class_labels import CAPTIONS_HINT, has_labels
from clasp.evaluation.equal_items import like_class_name_lines
from clasp.evaluation.from_pairs import zeroshot_task
from clasp.evaluation.task_context import TaskContext
from clasp.evaluation.tasks import ZeroShotTask
from clasp.evaluation.zeroshot import read_class_names, read_descriptions, read_templates


def build_zeroshot(context: TaskContext) -> ZeroShotTask:
    """Raises ``UserError`` for pairs without a class, a class list or a template that cannot be used."""
    pairs, options = context.pairs, context.options
    label = options["label"]
    has_labels(pairs, label, context.data)
    found = {str(pair.meta[label]) for pair in pairs}
    if len(found) == len(pairs) > 1:
        context.say(f"each of the {len(pairs)} images of {context.data} has a class of its own; {CAPTIONS_HINT}")
    classes = read_class_names(options["classes"]) if "classes" in options else sorted(found)
    for line in like_class_name_lines(classes):
        context.say(line)
    task = zeroshot_task(
        pairs,
        context.inputs,
        classes=classes,
        templates=read_templates(options["templates"]),
        data=context.data,
        label=label,
        descriptions=read_descriptions(options["descriptions"]) if "descriptions" in options else None,
    )
    context.inputs.tell_apart(task.queries.comparable_prompts)
    return task
