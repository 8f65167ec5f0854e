"""An evaluation task from outside: ``clasp eval RUN toytasks:POSITIVE data=PAIRS axis=1``."""

from __future__ import annotations

from clasp.evaluation.embedding_table import embed_batches
from clasp.evaluation.options import TaskOption
from clasp.evaluation.registry import TaskEntry
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.task_context import TaskContext


def share_of_positives(context: TaskContext) -> list[EvaluationResult]:
    """The share of images whose embedding is positive along one axis."""
    images = embed_batches(context.inputs.images(context.pairs)(), context.model.embed_image, "image")
    share = (images.vectors[:, int(context.options["axis"])] > 0).float().mean().item()
    context.say(f"axis {context.options['axis']}")
    return [
        EvaluationResult(
            task="positive",
            data=context.data,
            language="",
            metrics={"share": share},
            chance={"share": 0.5},
            n=len(images.ids),
            interval={},
            seconds=0.0,
        )
    ]


POSITIVE = TaskEntry(
    share_of_positives, "share of positive coordinates", (TaskOption("axis", "which of the coordinates", "0"),)
)
