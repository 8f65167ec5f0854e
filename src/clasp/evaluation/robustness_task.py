"""The task ``robustness``: zero-shot classification of images that are corrupted as they are read.

Input: a ``TaskContext`` whose pairs have a class. Output: a row for the clean images, one for each corruption (the mean
over severities) and their mean. Note: intervals are on the same draws of images throughout; with a frozen image tower
the features of every corruption are kept in the feature cache, as those of other images.
"""

from __future__ import annotations

from dataclasses import replace

from clasp.data.corruptions import CORRUPTIONS, MAX_SEVERITY, CorruptedImage
from clasp.data.pairs import Pairs
from clasp.data.plugins import valid_names
from clasp.evaluation.embedding_folder import StoredEncoder
from clasp.evaluation.results import EvaluationResult, PartialResult, mean_result
from clasp.evaluation.task_context import TaskContext
from clasp.evaluation.tasks import ZeroShotTask
from clasp.evaluation.zeroshot_task import build_zeroshot
from clasp.types import UserError


def evaluate_robustness(context: TaskContext) -> list[EvaluationResult]:
    """The rows of zero-shot classification. Raises ``UserError`` for an unknown corruption, a
    severity that is none, and a model that reads no images."""
    names, severities = _names(context.options["corruptions"]), _severities(context.options["severities"])
    clean = build_zeroshot(context)
    if isinstance(context.model, StoredEncoder):
        raise UserError(f"robustness corrupts the images, and {context.model.name} has their embeddings only")
    pairs = list(context.pairs)
    rows = [replace(_evaluate(clean, context), direction="clean")]
    for name in names:
        parts = []
        for severity in severities:
            corrupted = [replace(pair, image=CorruptedImage(pair.image, name, severity)) for pair in pairs]
            images = context.inputs.images(Pairs(f"{context.pairs.name} ({name} {severity})", [corrupted]))
            parts.append(_evaluate(replace(clean, images=images), context))
        rows.append(_mean(parts, name))
    rows.append(_mean(rows[1:], "mean"))
    return [row.finish("robustness", context.data) for row in rows]


def _evaluate(task: ZeroShotTask, context: TaskContext) -> PartialResult:
    (row,) = task.partial_results(task.scored(context.model), task.resamples)
    return row


def _mean(rows: list[PartialResult], direction: str) -> PartialResult:
    seconds = sum(row.shared_seconds + row.own_seconds for row in rows)
    return replace(mean_result(rows, language="", direction=direction, own_seconds=seconds), shared_seconds=0.0)


def _names(given: str) -> list[str]:
    names = list(CORRUPTIONS) if given == "all" else given.split(",")
    for name in names:
        if name not in CORRUPTIONS:
            raise UserError(f"corruptions={given}: {name!r} is not one; {valid_names(name, list(CORRUPTIONS))}")
    if len(set(names)) < len(names):
        raise UserError(f"corruptions={given} names one twice")
    return names


def _severities(given: str) -> list[int]:
    parts = given.split(",")
    if not all(part in map(str, range(1, MAX_SEVERITY + 1)) for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"severities={given} must be numbers from 1 to {MAX_SEVERITY}, separated by commas")
    return [int(part) for part in parts]
