"""Pairs with a class made into the tasks ``knn`` and ``probe``: what is fitted on, and what is asked.

Input: a ``TaskContext``. Output: a task. Note: the images to fit on are ``fit=`` or, without it, the half of the data
that ``clasp eval RUN retention`` fits on too; errors in pairs and options are raised before an image is read.
"""

from __future__ import annotations

from collections import Counter

from clasp.data.pairs import Pairs
from clasp.errors import counted
from clasp.evaluation.class_labels import has_labels
from clasp.evaluation.probe_queries import Probe, ProbeQueries, knn_of, linear_of
from clasp.evaluation.retention.probes import ImageProbe, make_image_probe
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
    has_labels(context.pairs, label, context.data)
    fit = context.open_pairs(options["fit"]) if "fit" in options else None
    plan = make_image_probe(context.pairs, fit, label, context.data, options.get("fit", ""))
    if fit is None:
        left = f"; {plan.skipped} are left out, since none of their class is fitted on" if plan.skipped else ""
        context.say(
            f"fitted on {len(plan.fit):,} of the {len(context.pairs):,} images of {context.data}, by a hash of their "
            f"group, and asked about {len(plan.queries):,} others{left}; fit=PAIRS names images to fit on"
        )
    return plan


def _task(context: TaskContext, name: str, plan: ImageProbe, probe: Probe) -> SingleTask[ProbeQueries]:
    halved = "fit" not in context.options  # all of the data is embedded at once, as other tasks do
    queries = ProbeQueries(
        labels={pair.id: str(pair.meta[plan.label]) for pair in plan.queries},
        groups={pair.id: pair.group for pair in plan.queries},
        fit_labels={pair.id: str(pair.meta[plan.label]) for pair in plan.fit},
        fit_groups={pair.id: pair.group for pair in plan.fit},
        classes=plan.classes,
        fit=None if halved else context.inputs.images(Pairs("fit", [list(plan.fit)])),
        probe=probe,
    )
    images = context.inputs.images(context.pairs)
    return SingleTask(data=context.data, images=images, queries=queries, name=name, primary="top1")


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
