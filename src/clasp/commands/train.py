"""The main job: a recipe and its pairs become a run folder.

Opens the pairs and sets a validation part aside, reads frozen towers once, trains the selection, evaluates, and writes
the run with its card. What a person should know on the way is handed to ``say``; nothing is printed here.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import PartialState

from clasp.config.build import ModelAndPreprocessing, build_feature_source, build_model_and_preprocessing
from clasp.config.datasets import (
    TrainValPairs,
    hash_pairs,
    open_training_pairs,
    plan_run,
)
from clasp.config.recipe import Recipe
from clasp.data.loader import PairLoader
from clasp.data.pairs import Pairs, skipped_lines
from clasp.data.readers import LiveImageReader, PairIndex
from clasp.evaluation.from_pairs import validation_task
from clasp.evaluation.tasks import EvaluationResult
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.report.model_card import render_model_card
from clasp.training.attention_kernel import choose_attention_kernel, use_attention_kernel
from clasp.training.cost.frozen import count_frozen_flops
from clasp.training.cost.ledger import COST_FILE as COST
from clasp.training.cost.ledger import CostLedger, RunCost, read_cost
from clasp.training.initialize import initialize_heads, initialize_low_rank
from clasp.training.loop import FitResult, fit
from clasp.training.losses import build_loss
from clasp.training.precision import resolve_precision
from clasp.training.run_folder import RunFolder
from clasp.training.settings import TrainSettings
from clasp.training.state import TrainState
from clasp.training.trackers.console import Reporter, SilentReporter
from clasp.types import MessageCallback, ProgressFactory, SkippedSample, UserError, no_progress_bar


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came of a run."""

    run: Path
    fitted: FitResult
    results: list[EvaluationResult]
    delta_bytes: int
    cost: RunCost


def train_recipe(
    recipe: Recipe,
    run: Path,
    *,
    say: MessageCallback,
    bar: ProgressFactory = no_progress_bar,
    reporter: Reporter | None = None,
    resume: bool = False,
    pairs: TrainValPairs | None = None,
    parts: ModelAndPreprocessing | None = None,
) -> TrainResult:
    """Train a recipe into the folder ``run``; with ``resume``, go on where it stopped.

    ``pairs`` and ``parts`` are the recipe's own, from whoever has them in memory; the model is trained in place.
    Raises ``UserError`` for anything the user can mend, as early as it can be known.
    """
    folder = RunFolder(run)
    start = folder.read_state() if resume else folder.require_free()
    train, val = pairs or open_training_pairs(recipe)
    for line in skipped_lines(train, val):
        say(line)
    parts = parts or build_model_and_preprocessing(recipe, lambda: PairIndex(train).texts)
    if start is not None:  # as it was then, whatever the libraries would make of its recipe today
        parts = replace(parts, tokenizer=folder.read().tokenizer)
    parts.model.to(PartialState().device).eval()
    if recipe.train.activation_checkpointing == "blocks":
        for tower in (parts.model.image, parts.model.text):
            tower.enable_activation_checkpointing()
    report = lambda skipped: folder.append("log.jsonl", map(_skipped_event, skipped))  # noqa: E731
    ledger = _ledger(folder, parts.model, start)
    inputs = build_feature_source(parts, recipe, bar=ledger.time_features(bar), say=say, report=report)
    plan = plan_run(recipe, train, inputs)
    say(plan.reason)
    settled = recipe.model_copy(update={"train": _resolve_attention_kernel(plan.resolved(recipe.train), parts.model)})
    listing = PairIndex(train)
    content = hash_pairs(listing, val)
    if start is None:
        folder.start(settled.to_toml(), parts.model, parts.transform, parts.tokenizer, pairs=content)
    else:
        _require_unchanged(folder, settled, parts.model, content)
    assert settled.train.attention != "auto"
    with ledger, use_attention_kernel(settled.train.attention):
        done = _train(
            settled, folder, parts.model, inputs, train, val, listing, reporter or SilentReporter(), start, ledger
        )
    if not done.fitted.interrupted:
        folder.finish()
    return done


def _ledger(folder: RunFolder, model: DualEncoder, resume_state: TrainState | None) -> CostLedger:
    """The ledger of this session; a run that goes on may be one whose costs were not kept before."""
    parts = {name: {"total": count.total, "trained": count.trained} for name, count in model.parameter_counts().items()}
    device = next(model.parameters()).device
    if resume_state is None:
        return CostLedger(device, parts)
    earlier = read_cost(folder.path) if (folder.path / COST).exists() else None
    return CostLedger(device, parts, first_step=resume_state.position.step, earlier=earlier)


# --- the steps -------------------------------------------------------------------------------------------------------


def _resolve_attention_kernel(settings: TrainSettings, model: DualEncoder) -> TrainSettings:
    """The settings with the attention kernel chosen; written down with them, since a run goes on as it began."""
    device = next(model.parameters()).device
    kernel = choose_attention_kernel(
        settings.attention, resolve_precision(settings.precision, device).precision, device
    )
    return settings.model_copy(update={"attention": kernel.attention})


def _train(
    recipe: Recipe,
    folder: RunFolder,
    model: DualEncoder,
    inputs: FeatureSource,
    train: Pairs,
    val: Pairs,
    listing: PairIndex,
    reporter: Reporter,
    resume_state: TrainState | None,
    ledger: CostLedger,
) -> TrainResult:
    settings = recipe.train
    image_side, text_side = inputs.image_reader(train, recipe.data.augment), inputs.text_reader(listing)
    task = validation_task(train, val, inputs)
    assert settings.batch_size != "auto"
    batches = PairLoader(
        listing,
        image_side,
        text_side,
        batch_size=settings.batch_size,
        seed=settings.seed,
        workers=settings.workers if isinstance(image_side, LiveImageReader) else 0,
        captions=recipe.data.captions,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )
    ledger.once = ledger.timed_as("counting", count_frozen_flops)(inputs, image_side, text_side, listing.texts)

    def save(state: TrainState) -> None:
        folder.save_state(state)
        folder.write(COST, ledger.cost().to_json())

    with closing(batches), ledger.stage("training"):
        if resume_state is None:
            initialize_heads(model, inputs, train, listing, recipe.head, batches.bad_samples)
            initialize_low_rank(model, batches, build_loss(recipe.loss), recipe.tune, settings)
        else:
            batches.bad_samples.add(resume_state.skipped)
        fitted = fit(
            model,
            batches,
            build_loss(recipe.loss),
            settings,
            log=lambda row: folder.append("log.jsonl", [row]),
            evaluate=ledger.timed_as("evaluation", lambda: task(model)),
            primary=task.primary,
            save=ledger.timed_as("saving", save),
            resume_state=resume_state,
            kinds=model.parameter_kinds,
            reporter=reporter,
            ledger=ledger,
        )
    delta_bytes = folder.save(model)
    results = [] if fitted.interrupted else ledger.timed_as("evaluation", task.results)(model)
    folder.append("results.jsonl", [asdict(row) for row in results])
    cost = ledger.cost(delta_bytes)
    folder.write(COST, cost.to_json())
    folder.write(
        "README.md", render_model_card(recipe, model, folder.path, fitted, results, cost, len(train), len(val))
    )
    return TrainResult(folder.path, fitted, results, delta_bytes, cost)


def _require_unchanged(folder: RunFolder, recipe: Recipe, model: DualEncoder, content: str) -> None:
    """A run goes on with its own recipe, towers and pairs, or not at all: it would end as no run ever would."""
    facts = folder.read()
    folder.require_same_bases(model)
    if facts.recipe != recipe.to_dict():
        raise UserError(f"{folder.path} was started with another recipe; a run goes on with its own only")
    if facts.base.get("pairs") != content:
        raise UserError(
            f"{folder.path} cannot go on: the pairs of {recipe.data.train} have changed since it was stopped"
        )


def _skipped_event(sample: SkippedSample) -> dict[str, str]:
    return {"event": "skipped", **sample._asdict()}
