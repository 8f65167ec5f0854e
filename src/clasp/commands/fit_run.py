"""The training of a run: its batches, the initial values of heads and low-rank updates, and the loop.

In: a ``RunContext`` and the task that decides between weights. Out: the model trained in place and ``FitResult``; on
the way states and costs to the run folder, metrics to the tracker.
"""

from __future__ import annotations

from contextlib import closing

from clasp.commands.run_context import RunContext
from clasp.data.loader import PairLoader
from clasp.data.readers import LiveImageReader
from clasp.training.cost.frozen import count_frozen_flops
from clasp.training.cost.ledger import COST_FILE
from clasp.training.initialize import initialize_heads, initialize_low_rank
from clasp.training.loop import FitCallbacks, fit
from clasp.training.losses import build_loss
from clasp.training.state import FitResult, TrainState
from clasp.types import Evaluator


def open_batches(context: RunContext) -> PairLoader:
    """The batches of the training pairs; what of the towers is frozen is computed here, unless it is in the cache."""
    recipe, listing = context.recipe, context.listing
    image_side = context.inputs.image_reader(context.train, recipe.data.augment)
    text_side = context.inputs.text_reader(listing)
    count = context.ledger.timed_as("counting", count_frozen_flops)
    context.ledger.once = count(context.inputs, image_side, text_side, listing.texts)
    assert recipe.train.batch_size != "auto"
    return PairLoader(
        listing,
        image_side,
        text_side,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        workers=recipe.train.workers if isinstance(image_side, LiveImageReader) else 0,
        captions=recipe.data.captions,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )


def fit_run(context: RunContext, batches: PairLoader, task: Evaluator) -> FitResult:
    """Initialises what training starts from, or restores it; runs the loop; closes the batches."""
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
            initialize_heads(model, context.inputs, context.train, context.listing, recipe.head, batches.bad_samples)
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
