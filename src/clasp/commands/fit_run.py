"""The training of a run: its batches, the initial values of heads and low-rank updates, and the loop.

Input: a ``RunContext``, and the evaluations that select the weights. Output: the model trained in place and
``FitResult``; during training, states and costs are written to the run folder, metrics to the tracker.
"""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial

from clasp.commands.run_context import RunContext
from clasp.commands.run_evaluations import RunEvaluations
from clasp.data.loader import BadSampleLimit, BatchReader, PairLoader, PartReader
from clasp.data.readers import LiveImageReader
from clasp.training.batch_parts import PartBatches
from clasp.training.class_pair_batches import ClassPairReader, class_pair_rows
from clasp.training.class_pairs import ClassPairFeatures, class_pair_features
from clasp.training.cost import COST_FILE
from clasp.training.cost.frozen import count_frozen_flops
from clasp.training.initialize import initialize_heads, initialize_low_rank, standardize_of_pairs
from clasp.training.loop import FitCallbacks, FitOptions, fit
from clasp.training.losses import build_loss
from clasp.training.state import FitResult, TrainState
from clasp.types import Loss, SkippedSample, UserError


def open_batches(context: RunContext, sides: BatchReader) -> PairLoader:
    """The batches of the training pairs, each side read by its reader; this process's part of each."""
    processes = context.processes
    count = context.ledger.timed_as("counting", count_frozen_flops)
    context.ledger.once = count(context.inputs, sides, context.listing.texts)
    if processes.size == 1:
        return _loader(context, _with_class_pairs(context, sides))
    with processes.alike():
        _require_divisible_work(context)
    return _loader(context, PartReader(sides.pairs, sides.image, sides.text, processes.rank, processes.size))


def _require_divisible_work(context: RunContext) -> None:
    """Raises ``UserError`` for what only a single process trains exactly."""
    recipe, size = context.recipe, context.processes.size
    assert recipe.train.batch_size != "auto"
    if recipe.train.batch_size < size:
        raise UserError(
            f"train.batch_size = {recipe.train.batch_size} is less than the {size} processes; each needs a pair"
        )
    if recipe.data.class_ratio is not None:
        raise UserError(
            f"data.class_ratio = {recipe.data.class_ratio:g} is for one process: it draws class pairs for whole batches"
        )
    if context.model.moving:
        raise UserError(
            f"{len(context.model.moving)} running statistics of BatchNorm are updated over whole batches, which only "
            "one process has; choose norms without: image.net.stem = 'group', image.net.branch.kind = 'gated'"
        )


def _loader(context: RunContext, sides: BatchReader) -> PairLoader:
    recipe = context.recipe
    assert recipe.train.batch_size != "auto"
    return PairLoader(
        sides,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        workers=recipe.train.workers if isinstance(sides.image, LiveImageReader) else 0,
        captions=recipe.data.captions,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )


def fit_run(context: RunContext, sides: BatchReader, batches: PairLoader, evaluations: RunEvaluations) -> FitResult:
    """Initialise heads and low-rank updates, or restore a saved state; run the loop; close the batches."""
    recipe, ledger, model, loss = context.recipe, context.ledger, context.model, build_loss(context.recipe.loss)
    processes = context.processes

    def save(state: TrainState) -> None:
        context.folder.save_state(state)
        context.folder.write(COST_FILE, ledger.cost().to_json())

    callbacks = FitCallbacks(
        tracker=context.tracker,
        reporter=context.reporter,
        evaluate=ledger.timed_as("evaluation", evaluations),
        primary=evaluations.task.primary,
        save=ledger.timed_as("saving", save) if processes.is_first else None,
    )
    options = FitOptions(
        kinds=model.parameter_kinds,
        resume_state=context.state,
        processes=processes,
        precision=context.inputs.precision_choice,
        ledger=ledger,
    )
    with closing(batches), ledger.stage("training"):
        if context.state is None:
            skipped = processes.first(partial(_initialize, context, sides, batches, loss))
            processes.copy_from_first(model.state_dict().values())
        else:
            skipped = context.state.skipped
        batches.bad_samples.add(skipped)
        return fit(
            model,
            batches if processes.size == 1 else PartBatches(batches, processes),
            loss,
            recipe.train,
            callbacks,
            options,
        )


def _initialize(context: RunContext, sides: BatchReader, batches: PairLoader, loss: Loss) -> tuple[SkippedSample, ...]:
    """Initialise heads and low-rank updates from whole batches; returns the samples that cannot be read."""
    recipe, model = context.recipe, context.model
    with nullcontext(batches) if context.processes.size == 1 else closing(_loader(context, sides)) as whole:
        if recipe.head.standardize and recipe.train.starts_heads:
            classes = _class_pairs(context)
            if context.heads is None:
                initialize_heads(model, _plain(context, sides), recipe.head, whole.bad_samples, classes)
            else:
                context.heads(model)
        initialize_low_rank(model, whole, loss, recipe.tune, recipe.train)
    return tuple(SkippedSample(*found) for found in whole.bad_samples.found.items())


def _class_pairs(context: RunContext) -> ClassPairFeatures | None:
    """The class pairs that count in the closed form; their use is logged."""
    if context.classes is None:
        return None
    context.tracker.log({"event": "class_pairs", "message": str(context.classes)}, 0)
    context.reporter.note(str(context.classes))
    return class_pair_features(context.classes, context.model, context.inputs)


def _with_class_pairs(context: RunContext, sides: BatchReader) -> BatchReader:
    """The readers, with class pairs in each batch where ``data.class_ratio`` asks for them."""
    recipe = context.recipe
    if recipe.data.class_ratio is None:
        return sides
    assert context.classes is not None
    features = class_pair_features(context.classes, context.model, context.inputs)
    tally = BadSampleLimit(len(context.listing), recipe.data.max_bad_fraction)
    standardize = standardize_of_pairs(context.model, _plain(context, sides), tally)
    rows = class_pair_rows(features, standardize, recipe.data.class_ratio, recipe.head.mean_shrinkage)
    return ClassPairReader.around(sides, rows)


def _plain(context: RunContext, sides: BatchReader) -> BatchReader:
    """The readers without augmentation, for the initialisation of heads."""
    if context.recipe.data.augment is None:
        return sides
    return replace(sides, image=context.inputs.image_reader(context.train, None))
