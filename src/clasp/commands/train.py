"""``clasp train``: train a recipe on its pairs into a run folder.

Input: a ``Recipe`` and a folder. Output: ``TrainResult``, and the run folder with its model card. Opens the pairs and
holds out a validation part, caches the features of frozen towers, trains the trainable parameters and evaluates. Note:
status lines are passed to ``say``; nothing is printed here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clasp.commands.disk_space import require_room_for_run
from clasp.commands.fit_run import fit_run, open_batches
from clasp.commands.run_context import Preloaded, RunContext, open_ledger, read_earlier_cost, resolve_recipe
from clasp.commands.run_evaluations import RunEvaluations
from clasp.config.build import (
    CacheFolders,
    ModelAndPreprocessing,
    build_feature_source,
    build_model_and_preprocessing,
    class_pairs_of_recipe,
)
from clasp.config.datasets import open_all_pairs, select_training_pairs
from clasp.config.recipe import Recipe
from clasp.config.run_plan import plan_run
from clasp.data.distinct_captions import require_different_captions, require_distinct_captions
from clasp.data.folder_lock import lock_folder
from clasp.data.formats.setting_hints import RECIPE_HINTS
from clasp.data.missing_images import require_images
from clasp.data.pairs import skipped_lines
from clasp.data.readers import PairIndex
from clasp.data.sample_size import few_validation_pairs
from clasp.evaluation.from_pairs import require_validation, validation_task
from clasp.evaluation.identity import validation_identity
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.shared_encoder import SharedEncoder
from clasp.evaluation.tasks import EvaluationTask, ScoredQueries
from clasp.models.features import FeatureSource
from clasp.models.precision import PrecisionChoice, resolve_precision
from clasp.report.model_card import ModelCard, with_evaluations
from clasp.report.run_record import read_results
from clasp.training.cost import COST_FILE
from clasp.training.cost.ledger import RunCost
from clasp.training.distributed import LostProcessError, Processes
from clasp.training.run_code import require_allowed, tracker_code_names
from clasp.training.run_folder import RunFolder
from clasp.training.state import FitResult, TrainState
from clasp.training.trackers.console import Reporter, SilentReporter
from clasp.training.trackers.group import TrackerGroup
from clasp.training.trackers.registry import TrackerFactory, find_trackers, open_trackers, silent_trackers
from clasp.training.warm_start import load_initial_weights
from clasp.types import MessageCallback, ProgressFactory, TrackedRun, UserError, no_progress_bar

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a run; ``scored``: the validation ``task``'s scores of single queries (empty where interrupted);
    ``candidates``: the evaluations among which the best selected the weights."""

    run: Path
    fitted: FitResult
    results: list[EvaluationResult]
    delta_bytes: int
    cost: RunCost
    task: EvaluationTask
    scored: list[ScoredQueries]
    candidates: int


def train_recipe(
    recipe: Recipe,
    run: Path,
    *,
    say: MessageCallback,
    bar: ProgressFactory = no_progress_bar,
    reporter: Reporter | None = None,
    resume: bool = False,
    preloaded: Preloaded | None = None,
) -> TrainResult:
    """Train a recipe into the folder ``run``, or ``resume`` it from its saved state. Raises ``UserError`` early."""
    assert recipe.auto is None, "a recipe with [auto] is for commands.auto"
    folder, loaded = RunFolder(run), preloaded or Preloaded()
    processes = loaded.processes
    if resume:
        require_allowed(tracker_code_names(recipe.to_dict()), run)
    else:
        processes.first(folder.require_available)
    with processes.alike():
        tracker_classes = find_trackers(recipe.train.trackers)
    with ExitStack() as stack:
        processes.first(lambda: stack.enter_context(_held(folder)))
        state = processes.first(lambda: folder.read_state() if resume else folder.require_free())
        opened, val = processes.in_turn(lambda: loaded.pairs or open_all_pairs(recipe))
        with processes.alike():
            train = select_training_pairs(recipe, (opened, val))
            require_validation(train, val)
            require_images(RECIPE_HINTS, train, val, max_bad_fraction=recipe.data.max_bad_fraction)
            listing = PairIndex(train)
            require_different_captions(listing.texts, train.name)
        _announce(skipped_lines(train, val), say)
        parts = processes.in_turn(lambda: loaded.parts or build_model_and_preprocessing(recipe, lambda: listing.texts))
        parts = _prepare(parts, recipe, folder, state, loaded)
        with processes.alike():
            require_distinct_captions(listing.texts, parts.tokenizer)
        tracker = _open_trackers(tracker_classes, folder, state, processes, say)
        ledger = open_ledger(parts.model, state, processes.first(lambda: read_earlier_cost(folder, state)))
        bars = ledger.time_features(bar)
        inputs = _open_inputs(parts, recipe, state, loaded, bar=bars, say=say, report=tracker.log_skipped)
        with processes.alike():
            plan = plan_run(recipe, train, inputs)
        _announce([plan.reason, *([] if loaded.pairs else few_validation_pairs(val.group_count))], say)
        context = RunContext(
            folder=folder,
            recipe=processes.first(lambda: resolve_recipe(recipe, plan, parts.model, state)),
            parts=parts,
            inputs=inputs,
            opened=opened,
            train=train,
            val=val,
            classes=processes.in_turn(lambda: class_pairs_of_recipe(recipe, parts.model)),
            heads=loaded.heads,
            listing=listing,
            state=state,
            ledger=ledger,
            tracker=tracker,
            reporter=reporter or SilentReporter(),
            processes=processes,
        )
        return _train(context)


# --- the steps -------------------------------------------------------------------------------------------------------


@contextmanager
def _held(folder: RunFolder) -> Iterator[None]:
    """Holds the lock of the folder."""
    with lock_folder(folder.path) as folder.require_held, _failed_starts_undone(folder):
        folder.remove_partial_writes()
        yield


@contextmanager
def _failed_starts_undone(folder: RunFolder) -> Iterator[None]:
    """Deletes what a start left that ended before its first state was saved, and the first state of one that failed in
    its first steps: the same command would start, and resuming fail in the same way."""
    try:
        yield
    except BaseException as error:
        fails_again = isinstance(error, Exception) and not isinstance(error, LostProcessError)
        with suppress(UserError):
            folder.require_held()  # else it was moved, and its place may be another run's
            if fails_again and folder.has_only_first_state:
                folder.finish()
            else:
                folder.discard_start()
        raise


def _announce(lines: Iterable[str], say: MessageCallback) -> None:
    for line in lines:
        say(line)


def _open_trackers(
    classes: Mapping[str, TrackerFactory],
    folder: RunFolder,
    state: TrainState | None,
    processes: Processes,
    say: MessageCallback,
) -> TrackerGroup:
    """The trackers of the run, on the first process; the others record nothing."""
    if not processes.is_first:
        return silent_trackers()
    return open_trackers(classes, TrackedRun(folder.path, state.position.step if state else 0), folder.append, say)


def _train(context: RunContext) -> TrainResult:
    """Check the disk, start the run folder, fill the feature cache, train, save the delta, evaluate, and write
    everything to the folder."""
    ledger, inputs, processes = context.ledger, context.inputs, context.processes
    with ExitStack() as stack:
        stack.enter_context(context.attention_kernel())  # first, since cached features are of one kernel
        processes.first(lambda: require_room_for_run(context))
        context.start_or_resume()
        if processes.is_first:
            stack.enter_context(ledger)
        stack.enter_context(context.tracker)
        processes.first(lambda: context.tracker.config(context.recipe.to_dict()))
        # fills the feature cache
        sides = processes.in_turn(
            lambda: inputs.batch_reader(context.train, context.listing, context.recipe.data.augment)
        )
        batches = open_batches(context, sides)
        encoder = inputs.in_precision(context.model)
        shared = SharedEncoder(encoder, inputs, processes) if processes.size > 1 else None
        with processes.alike():
            task = validation_task(context.opened, context.val, shared or inputs)
        evaluations = RunEvaluations(task, shared or encoder, processes)
        fitted = fit_run(context, sides, batches, evaluations)
        delta_bytes = processes.first(lambda: context.folder.save(context.model))
        scored = [] if fitted.interrupted else ledger.timed_as("evaluation", evaluations.of_final_weights)(fitted)
        results, cost = processes.first(lambda: _finish(context, fitted, delta_bytes, task, scored))
        candidates = context.count_candidates()
        return TrainResult(context.folder.path, fitted, results, delta_bytes, cost, task, scored, candidates)


def _finish(
    context: RunContext, fitted: FitResult, delta_bytes: int, task: EvaluationTask, scored: list[ScoredQueries]
) -> tuple[list[EvaluationResult], RunCost]:
    """Write what is left to the folder; delete the training state of a completed run."""
    folder, ledger = context.folder, context.ledger
    results: list[EvaluationResult] = []
    if not fitted.interrupted:
        found = ledger.timed_as("evaluation", task.finish)(scored)
        found = validation_identity(task.name, context.opened, context.val).recorded_in(found)
        kept = folder.keep_results([result.to_row() for result in found])
        results = [EvaluationResult.from_row(row) for row in kept]
    cost = ledger.cost(delta_bytes)
    _write(context, fitted, results, cost)
    if not fitted.interrupted:
        folder.finish()
    return results, cost


def _prepare(
    parts: ModelAndPreprocessing, recipe: Recipe, folder: RunFolder, state: TrainState | None, loaded: Preloaded
) -> ModelAndPreprocessing:
    """The model on its device: with the saved tokenizer for a resumed run, or from the weights of ``init_from``, which
    features of tuned towers are of in a resumed run, too."""
    if state is not None:  # the saved one: other library versions may build another from the recipe
        parts = replace(parts, tokenizer=loaded.processes.first(lambda: folder.read().tokenizer))
    if recipe.train.init_from is not None and (state is None or loaded.tuned is not None):
        load_initial_weights(parts.model, recipe.to_dict())
    parts.model.to(loaded.processes.device).eval()
    if recipe.train.activation_checkpointing == "blocks":
        for tower in (parts.model.image, parts.model.text):
            tower.enable_activation_checkpointing()
    return parts


def _open_inputs(
    parts: ModelAndPreprocessing, recipe: Recipe, state: TrainState | None, loaded: Preloaded, **callbacks: Any
) -> FeatureSource:
    """The inputs of a run in the precision from before an interruption, or in that of the first process: features in
    another would be other features."""
    if state is not None:
        precision = PrecisionChoice(state.precision, "as before the interruption")
    else:
        device = next(parts.model.parameters()).device
        precision = loaded.processes.first(lambda: resolve_precision(recipe.train.precision, device))
    if loaded.tuned is None:
        return build_feature_source(parts, recipe, precision=precision, **callbacks)
    assert recipe.train.epochs == 0, "the features of towers that train are not cached"
    parts.model.freeze()
    try:
        return build_feature_source(
            parts, recipe, precision=precision, folders=CacheFolders(tuned=loaded.tuned), **callbacks
        )
    finally:
        parts.model.select(parts.model.selection)


def _write(context: RunContext, fitted: FitResult, results: Sequence[EvaluationResult], cost: RunCost) -> None:
    """Write costs and model card to the folder, costs and results to the tracker; finishes the tracker."""
    context.folder.write(COST_FILE, cost.to_json())
    card = ModelCard(
        recipe=context.recipe,
        model=context.model,
        run=context.folder.path,
        fitted=fitted,
        results=results,
        cost=cost,
        train_pairs=len(context.train),
        val_pairs=len(context.val),
        classes=context.classes,
        candidates=context.count_candidates(),
    )
    text = card.render()
    try:
        text = with_evaluations(text, read_results(context.folder.path))
    except UserError as error:  # lines that something else has written do not cost the run its card
        _log.warning("%s does not show evaluations: %s", context.folder.path / "README.md", error)
    context.folder.write("README.md", text)
    context.tracker.log({"event": "cost", **cost.metrics()}, fitted.position.step)
    context.tracker.finish([asdict(row) for row in results])
