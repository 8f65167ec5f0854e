"""The tasks ``multilabel`` and ``multilabel_probe``: classification of images that may have several classes, zero-shot
or by logistic regression on image embeddings.

Input: a ``TaskContext`` whose pairs list their classes in one column. Output: a row with the means over classes of
average precision and of the area under the ROC curve. Note: neither is a mean over images, so there are no intervals
and no comparison of two models; classes that all or none of the images have are left out, and a status line counts
them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clasp.errors import counted
from clasp.evaluation import multilabel
from clasp.evaluation.class_labels import label_choices
from clasp.evaluation.embedding_table import embed_batches
from clasp.evaluation.name_checks import quote_first
from clasp.evaluation.probes import multilabel_probe
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.retention.probes import require_disjoint
from clasp.evaluation.task_context import TaskContext
from clasp.evaluation.zeroshot import ZeroShotQueries, read_class_names, read_descriptions, read_templates
from clasp.types import Pair, UserError


def evaluate_multilabel(context: TaskContext) -> list[EvaluationResult]:
    """One row. Raises ``UserError`` for a pair whose column holds no list of class names, or one that is no class."""
    start, options = time.perf_counter(), context.options
    labels = read_class_lists(context.pairs, options["label"], context.data)
    there = sorted({name for names in labels.values() for name in names})
    classes = read_class_names(options["classes"]) if "classes" in options else there
    if unknown := sorted(set(there) - set(classes)):
        lacking = f"{counted(len(unknown), 'class')} of {context.data}: {quote_first(unknown)}"
        raise UserError(f"classes={options['classes']} lacks {lacking}")
    _used_classes(context.data, _truth(labels, labels, classes))
    queries = ZeroShotQueries(
        labels={},
        classes=classes,
        templates=read_templates(options["templates"]),
        descriptions=read_descriptions(options["descriptions"]) if "descriptions" in options else None,
        read=context.inputs.read,
    )
    context.inputs.tell_apart(queries.comparable_prompts)
    images = embed_batches(context.inputs.images(context.pairs)(), context.model.embed_image, "image")
    truth = _truth(images.ids, labels, classes)
    used = _used_classes(context.data, truth)
    _say_left_out(context.data, used, context)
    scores = images.vectors @ queries.class_embeddings(context.model)[used].T
    return [_result("multilabel", context, scores, truth[:, used], start)]


def evaluate_multilabel_probe(context: TaskContext) -> list[EvaluationResult]:
    """One row, fitted to the images of ``fit=``. Raises ``UserError`` as ``evaluate_multilabel``, and for images that
    are in both."""
    start, options = time.perf_counter(), context.options
    fit, name = context.open_pairs(options["fit"]), options["fit"]
    labels = read_class_lists(context.pairs, options["label"], context.data)
    fit_labels = read_class_lists(fit, options["label"], name)
    require_disjoint(context.pairs, fit, context.data, name)
    classes = sorted({each for names in fit_labels.values() for each in names})
    if unknown := sorted({each for names in labels.values() for each in names} - set(classes)):
        lacking = f"{counted(len(unknown), 'class')} of {context.data}: {quote_first(unknown)}"
        raise UserError(f"fit={name} has no image of {lacking}")
    sides = f"fit={name} and {context.data}"
    _used_classes(sides, _truth(fit_labels, fit_labels, classes), _truth(labels, labels, classes))
    known = embed_batches(context.inputs.images(fit)(), context.model.embed_image, "image to fit on")
    images = embed_batches(context.inputs.images(context.pairs)(), context.model.embed_image, "image")
    fit_truth, truth = _truth(known.ids, fit_labels, classes), _truth(images.ids, labels, classes)
    used = _used_classes(sides, fit_truth, truth)  # again: images that cannot be read are missing
    _say_left_out(sides, used, context)
    number = {group: place for place, group in enumerate(sorted({pair.group for pair in fit}))}
    group_of = {pair.id: number[pair.group] for pair in fit}
    groups = torch.tensor([group_of[id] for id in known.ids])
    scores = multilabel_probe(known.vectors, fit_truth[:, used], groups, images.vectors)
    return [_result("multilabel_probe", context, scores, truth[:, used], start)]


def read_class_lists(pairs: Iterable[Pair], label: str, data: str) -> dict[str, list[str]]:
    """The class names of every pair, by id. Raises ``UserError`` for a pair whose column holds no list of them."""
    found = {}
    for pair in pairs:
        given = pair.meta.get(label)
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise UserError(f"{pair.id} of {data} has no list of class names in {label!r}; {label_choices(pair)}")
        found[pair.id] = given
    return found


def _truth(ids: Iterable[str], labels: Mapping[str, Sequence[str]], classes: Sequence[str]) -> Bool[Tensor, "n C"]:
    return torch.tensor([[name in labels[id] for name in classes] for id in ids], dtype=torch.bool)


def _used_classes(data: str, *truths: Bool[Tensor, "_ C"]) -> Bool[Tensor, " C"]:
    """The classes that some images have and others have not, on all sides. Raises ``UserError`` where there is none."""
    used = torch.stack([truth.any(dim=0) & ~truth.all(dim=0) for truth in truths]).all(dim=0)
    if not used.any():
        raise UserError(f"{data}: no class is that of some images and not of others" + " in both" * (len(truths) > 1))
    return used


def _say_left_out(data: str, used: Bool[Tensor, " C"], context: TaskContext) -> None:
    if lacking := int((~used).sum()):
        context.say(f"{data}: left out: {lacking} of {len(used)} classes, of all images or of none")


def _result(
    task: str, context: TaskContext, scores: Float[Tensor, "n C"], truth: Bool[Tensor, "n C"], start: float
) -> EvaluationResult:
    return EvaluationResult(
        task=task,
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
        n=len(truth),
        interval={},
        seconds=time.perf_counter() - start,
    )
