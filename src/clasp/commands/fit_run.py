"""The training of a run: its batches, the initial values of heads and low-rank updates, and the loop.

Input: a ``RunContext`` and the validation task that selects the weights. Output: the model trained in place and
``FitResult``; during training, states and costs are written to the run folder, metrics to the tracker.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from clasp.commands.run_context import RunContext
from clasp.data.loader import BadSampleLimit, BatchReader, PairLoader
from clasp.data.readers import LiveImageReader
from clasp.training.class_pair_batches import ClassPairReader, class_pair_rows
from clasp.training.class_pairs import ClassPairFeatures, class_pair_features
from clasp.training.cost import COST_FILE
from clasp.training.cost.frozen import count_frozen_flops
from clasp.training.initialize import initialize_heads, initialize_low_rank, standardize_of_pairs
from clasp.training.loop import FitCallbacks, fit
from clasp.training.losses import build_loss
from clasp.training.state import FitResult, TrainState
from clasp.types import Evaluator


def open_batches(context: RunContext, sides: BatchReader) -> PairLoader:
    """The batches of the training pairs, each side read by its reader."""
    recipe = context.recipe
    count = context.ledger.timed_as("counting", count_frozen_flops)
    context.ledger.once = count(context.inputs, sides, context.listing.texts)
    assert recipe.train.batch_size != "auto"
    return PairLoader(
        _with_class_pairs(context, sides),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        workers=recipe.train.workers if isinstance(sides.image, LiveImageReader) else 0,
        captions=recipe.data.captions,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )


def fit_run(context: RunContext, sides: BatchReader, batches: PairLoader, task: Evaluator) -> FitResult:
    """Initialise heads and low-rank updates, or restore a saved state; run the loop; close the batches."""
    recipe, ledger, model, loss = context.recipe, context.ledger, context.model, build_loss(context.recipe.loss)

    def save(state: TrainState) -> None:
        context.folder.save_state(state)
        context.folder.write(COST_FILE, ledger.cost().to_json())

    callbacks = FitCallbacks(
        tracker=context.tracker,
        reporter=context.reporter,
        evaluate=ledger.timed_as("evaluation", lambda: task(model)),
        primary=task.primary,
        save=ledger.timed_as("saving", save),
        ledger=ledger,
    )
    with closing(batches), ledger.stage("training"):
        if context.state is None:
            if recipe.head.standardize and recipe.train.init_from is None:
                plain = _plain(context, sides)
                initialize_heads(model, plain, recipe.head, batches.bad_samples, _class_pairs(context))
            initialize_low_rank(model, batches, loss, recipe.tune, recipe.train)
        else:
            batches.bad_samples.add(context.state.skipped)
        return fit(
            model,
            batches,
            loss,
            recipe.train,
            callbacks,
            kinds=model.parameter_kinds,
            resume_state=context.state,
        )


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
    return ClassPairReader.around(sides, class_pair_rows(features, standardize, recipe.data.class_ratio))


def _plain(context: RunContext, sides: BatchReader) -> BatchReader:
    """The readers without augmentation, for the initialisation of heads."""
    if context.recipe.data.augment is None:
        return sides
    return replace(sides, image=context.inputs.image_reader(context.train, None))
