"""Pairs with a class made into the tasks ``knn`` and ``probe``: what is fitted on, and what is asked.

Input: a ``TaskContext``. Output: a task. Note: the images to fit on are ``fit=`` or, without it, the half of the data
that ``clasp eval RUN retention`` fits on too; errors in pairs and options are raised before an image is read.
"""

from __future__ import annotations

from collections import Counter

from clasp.data.pairs import Pairs
from clasp.errors import counted
from clasp.evaluation.probe_queries import Probe, ProbeQueries, knn_of, linear_of
from clasp.evaluation.retention.probes import ImageProbe, has_labels, make_image_probe
from clasp.evaluation.task_context import TaskContext
from clasp.evaluation.tasks import SingleTask
from clasp.types import UserError


def knn_task(context: TaskContext) -> SingleTask[ProbeQueries]:
    """k nearest neighbours among the embeddings of the fit set."""
    k, temperature = _whole(context, "k"), _positive(context, "temperature")
    return _task(context, "knn", _plan(context), knn_of(k, temperature))


def linear_task(context: TaskContext) -> SingleTask[ProbeQueries]:
    """Logistic regression on the embeddings of the fit set, of all or of a few images of each class."""
    plan = _plan(context)
    if "shots" not in context.options:
        return _task(context, "probe", plan, linear_of(None, 1))
    shots, draws = _whole(context, "shots"), _whole(context, "draws")
    count = Counter(str(pair.meta[plan.label]) for pair in plan.fit)
    few = min(plan.classes, key=lambda name: count[name])
    if count[few] < shots:
        raise UserError(
            f"probe: shots={shots}, and {few!r} has {counted(count[few], 'image')} to fit on; give fewer shots"
        )
    return _task(context, "probe", plan, linear_of(shots, draws))


def _plan(context: TaskContext) -> ImageProbe:
    label, options = context.options["label"], context.options
    pairs = Pairs(context.pairs.name, [list(context.pairs)])
    has_labels(pairs, label, context.data)
    fit = context.open_pairs(options["fit"]) if "fit" in options else None
    plan = make_image_probe(pairs, fit, label, context.data, options.get("fit", ""))
    if plan.skipped:
        skipped = counted(plan.skipped, "image")
        context.say(f"not queried: {skipped}, of whose class the half to fit on has none; fit= helps")
    return plan


def _task(context: TaskContext, name: str, plan: ImageProbe, probe: Probe) -> SingleTask[ProbeQueries]:
    fit, asked = Pairs("fit", [list(plan.fit)]), Pairs(context.pairs.name, [list(plan.queries)])
    queries = ProbeQueries(
        labels={pair.id: str(pair.meta[plan.label]) for pair in asked},
        groups={pair.id: pair.group for pair in asked},
        fit_labels={pair.id: str(pair.meta[plan.label]) for pair in fit},
        fit_groups={pair.id: pair.group for pair in fit},
        classes=plan.classes,
        fit=context.inputs.images(fit),
        probe=probe,
    )
    return SingleTask(
        data=context.data, images=context.inputs.images(asked), queries=queries, name=name, primary="top1"
    )


def _whole(context: TaskContext, name: str) -> int:
    text = context.options[name]
    if not (text.isdecimal() and 1 <= int(text) <= 100_000):
        raise UserError(f"{name}={text} must be a whole number from 1 to 100,000")
    return int(text)


def _positive(context: TaskContext, name: str) -> float:
    text = context.options[name]
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{name}={text} must be a number above 0")
    return value
