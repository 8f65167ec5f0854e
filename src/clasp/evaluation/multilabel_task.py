"""The task ``multilabel``: zero-shot classification of images that may have several classes.

Input: a ``TaskContext`` whose pairs list their classes in one column. Output: a row with the means over classes of
average precision and of the area under the ROC curve. Note: neither is a mean over images, so there are no intervals
and no comparison of two models; classes that all or none of the images have are left out, and a status line counts
them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from clasp.evaluation import multilabel
from clasp.evaluation.embedding_table import embed_batches
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.task_context import TaskContext
from clasp.evaluation.zeroshot import ZeroShotQueries, read_class_names, read_templates
from clasp.types import Pair, UserError


def evaluate_multilabel(context: TaskContext) -> list[EvaluationResult]:
    """One row. Raises ``UserError`` for a pair whose column holds no list of class names, or one that is no class."""
    start, options = time.perf_counter(), context.options
    labels = {pair.id: _class_list(pair, options["label"], context.data) for pair in context.pairs}
    there = sorted({name for names in labels.values() for name in names})
    classes = read_class_names(options["classes"]) if "classes" in options else there
    if unknown := sorted(set(there) - set(classes)):
        raise UserError(f"classes={options['classes']} lacks {len(unknown)} classes of {context.data}: {unknown[0]!r}")
    templates = read_templates(options["templates"])
    queries = ZeroShotQueries(labels={}, classes=classes, templates=templates, read=context.inputs.read)
    images = embed_batches(context.inputs.images(context.pairs)(), context.model.embed_image, "image")
    truth = torch.tensor([[name in labels[id] for name in classes] for id in images.ids])
    used = truth.any(dim=0) & ~truth.all(dim=0)
    if not used.any():
        raise UserError(f"{context.data}: no class is that of some images and not of others")
    if lacking := int((~used).sum()):
        context.say(f"{lacking} of {len(classes)} classes are those of all images or of none, and left out")
    truth = truth[:, used]
    scores = images.vectors @ queries.class_embeddings(context.model)[used].T
    result = EvaluationResult(
        task="multilabel",
        data=context.data,
        language="",
        metrics={
            "mean_average_precision": multilabel.average_precision(scores, truth).mean().item(),
            "mean_11_point_precision": multilabel.eleven_point_precision(scores, truth).mean().item(),
            "mean_roc_auc": multilabel.roc_auc(scores, truth).mean().item(),
        },
        chance={
            "mean_average_precision": truth.double().mean().item(),
            "mean_11_point_precision": truth.double().mean().item(),
            "mean_roc_auc": 0.5,
        },
        n=len(images.ids),
        interval={},
        seconds=time.perf_counter() - start,
    )
    return [result]


def _class_list(pair: Pair, label: str, data: str) -> Sequence[str]:
    given = pair.meta.get(label)
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        has = ", ".join(map(str, pair.meta)) or "none"
        raise UserError(f"{pair.id} of {data} has no list of class names in {label!r}; label= one of: {has}")
    return given
