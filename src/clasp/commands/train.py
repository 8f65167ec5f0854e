"""The main job: a recipe and its pairs become a run folder.

Opens the pairs and sets a validation part aside, reads frozen towers once, trains the selection, evaluates, and writes
the run with its card. What a person should know on the way is handed to ``say``; nothing is printed here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState

from clasp.commands.dry_run import work_once
from clasp.config.build import Assembled, assemble
from clasp.config.recipe import Recipe
from clasp.data.formats.rows import DEFAULT_COLUMNS
from clasp.data.loader import Batches, log_skipped
from clasp.data.pairs import Columns, Pairs, open_pairs, split
from clasp.data.readers import Listing, LiveImages
from clasp.evaluation.from_pairs import languages_of, validation
from clasp.evaluation.tasks import Result
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import Bar, Inputs, Say, no_bar
from clasp.report.model_card import card
from clasp.training.attention_kernel import attending, choose_attention
from clasp.training.cost.ledger import FILE as COST
from clasp.training.cost.ledger import Cost, Ledger, read_cost
from clasp.training.initialize import start_heads, start_low_rank
from clasp.training.loop import Fitted, choose, fit
from clasp.training.losses import loss_of
from clasp.training.precision import resolve
from clasp.training.run_folder import Run
from clasp.training.settings import LARGEST_BATCH, Plan, TrainSettings
from clasp.training.state import TrainState
from clasp.training.trackers.console import Reporter, Silent
from clasp.types import Pair, Skipped, UserError

LARGEST_LIVE_BATCH = 128  # where a tower is run in every step, its activations have to fit

Opened = tuple[Pairs, Pairs]  # to train on, to validate on
Reads = TypeVar("Reads", bound=Inputs)


@dataclass(frozen=True, slots=True)
class Aligned:
    """What came of a run."""

    run: Path
    fitted: Fitted
    results: list[Result]
    delta_bytes: int
    cost: Cost


def cache_folder() -> Path:
    """Where what can be computed again is kept: ``$CLASP_CACHE``, else ``~/.cache/clasp``."""
    return Path(os.environ.get("CLASP_CACHE") or Path.home() / ".cache" / "clasp")


def align(
    recipe: Recipe,
    run: Path,
    *,
    say: Say,
    bar: Bar = no_bar,
    reporter: Reporter | None = None,
    resume: bool = False,
    pairs: Opened | None = None,
    parts: Assembled | None = None,
) -> Aligned:
    """Train a recipe into the folder ``run``; with ``resume``, go on where it stopped.

    ``pairs`` and ``parts`` are the recipe's own, from whoever has them in memory; the model is trained in place.
    Raises ``UserError`` for anything the user can mend, as early as it can be known.
    """
    folder = Run(run)
    start = folder.read_state() if resume else folder.refuse_taken()
    train, val = pairs or training_pairs(recipe)
    parts = parts or assemble(recipe, lambda: Listing(train).texts)
    if start is not None:  # as it was then, whatever the libraries would make of its recipe today
        parts = replace(parts, tokenizer=folder.read().tokenizer)
    parts.model.to(PartialState().device).eval()
    if recipe.train.recompute == "blocks":
        for tower in (parts.model.image, parts.model.text):
            tower.recompute_blocks()
    report = lambda skipped: folder.append("log.jsonl", map(_unread, skipped))  # noqa: E731
    ledger = _ledger(folder, parts.model, start)
    inputs = inputs_of(parts, recipe, bar=ledger.timed(bar), say=say, report=report)
    plan = planned(recipe, train, inputs)
    say(plan.reason)
    settled = recipe.model_copy(update={"train": _with_kernel(plan.resolved(recipe.train), parts.model)})
    listing = Listing(train)
    content = content_hash(listing, val)
    if start is None:
        folder.start(settled.to_toml(), parts.model, parts.transform, parts.tokenizer, pairs=content)
    else:
        _refuse_changes(folder, settled, parts.model, content)
    assert settled.train.attention != "auto"
    with ledger, attending(settled.train.attention):
        done = _train(settled, folder, parts.model, inputs, train, val, listing, reporter or Silent(), start, ledger)
    if not done.fitted.interrupted:
        folder.finish()
    return done


def training_pairs(recipe: Recipe) -> Opened:
    """The pairs to train on and to validate on, filtered by language. Raises ``UserError``."""
    data = recipe.data
    if data.train is None:
        raise UserError(
            "no pairs to train on: set data.train to a folder, a .csv .tsv .jsonl .parquet file or tar shards"
        )
    pairs = _open(data.train, recipe)
    if data.val is not None:
        return pairs, _open(data.val, recipe)
    return split(pairs, data.val_fraction)


def planned(recipe: Recipe, train: Pairs, inputs: Inputs) -> Plan:
    """Batch, epochs and steps of a run. Raises ``UserError`` for a batch of more, or of too few to take parts of."""
    plan = choose(recipe.train, samples(train, recipe), largest=_largest_batch(inputs, recipe))
    recipe.loss.refuse_fewer(plan.batch)
    return plan


def inputs_of(
    parts: Assembled,
    recipe: Recipe,
    *,
    kind: type[Reads] = Inputs,
    bar: Bar = no_bar,
    say: Say = lambda line: None,
    report: Callable[[Iterable[Skipped]], None] = log_skipped,
) -> Reads:
    """The reader of pairs for a model that has just been built from a recipe."""
    return kind(
        image=parts.model.image,
        text=parts.model.text,
        transform=parts.transform,
        tokenizer=parts.tokenizer,
        features=recipe.data.features,
        cache=cache_folder(),
        bar=bar,
        say=say,
        report=report,
        workers=recipe.train.workers,
        views=recipe.data.views,
        seed=recipe.train.seed,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )


def _ledger(folder: Run, model: DualEncoder, start: TrainState | None) -> Ledger:
    """The ledger of this session; a run that goes on may be one whose costs were not kept before."""
    parts = {name: {"total": count.total, "trained": count.trained} for name, count in model.counts().items()}
    device = next(model.parameters()).device
    if start is None:
        return Ledger(device, parts)
    earlier = read_cost(folder.path) if (folder.path / COST).exists() else None
    return Ledger(device, parts, first_step=start.position.step, earlier=earlier)


# --- the steps -------------------------------------------------------------------------------------------------------


def _with_kernel(settings: TrainSettings, model: DualEncoder) -> TrainSettings:
    """The settings with the attention kernel chosen; written down with them, since a run goes on as it began."""
    device = next(model.parameters()).device
    kernel = choose_attention(settings.attention, resolve(settings.precision, device).precision, device)
    return settings.model_copy(update={"attention": kernel.attention})


def _train(
    recipe: Recipe,
    folder: Run,
    model: DualEncoder,
    inputs: Inputs,
    train: Pairs,
    val: Pairs,
    listing: Listing,
    reporter: Reporter,
    start: TrainState | None,
    ledger: Ledger,
) -> Aligned:
    settings = recipe.train
    image_side, text_side = inputs.image_side(train, recipe.data.augment), inputs.text_side(listing)
    task = validation(train, val, inputs)
    assert settings.batch != "auto"
    batches = Batches(
        listing,
        image_side,
        text_side,
        batch=settings.batch,
        seed=settings.seed,
        workers=settings.workers if isinstance(image_side, LiveImages) else 0,
        captions=recipe.data.captions,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )
    ledger.once = ledger.within("counting", work_once)(inputs, image_side, text_side, listing.texts)

    def save(state: TrainState) -> None:
        folder.save_state(state)
        folder.write(COST, ledger.cost().to_json())

    with closing(batches), ledger.stage("training"):
        if start is None:
            start_heads(model, inputs, train, listing, recipe.head, batches.tally)
            start_low_rank(model, batches, loss_of(recipe.loss), recipe.tune, settings)
        else:
            batches.tally.add(start.skipped)
        fitted = fit(
            model,
            batches,
            loss_of(recipe.loss),
            settings,
            log=lambda row: folder.append("log.jsonl", [row]),
            evaluate=ledger.within("evaluation", lambda: task(model)),
            primary=task.primary,
            save=ledger.within("saving", save),
            start=start,
            kinds=model.kinds,
            reporter=reporter,
            ledger=ledger,
        )
    delta_bytes = folder.save(model)
    results = [] if fitted.interrupted else ledger.within("evaluation", task.results)(model)
    folder.append("results.jsonl", [asdict(row) for row in results])
    cost = ledger.cost(delta_bytes)
    folder.write(COST, cost.to_json())
    folder.write("README.md", card(recipe, model, folder.path, fitted, results, cost, len(train), len(val)))
    return Aligned(folder.path, fitted, results, delta_bytes, cost)


def open_as_trained(
    source: str, recipe: Recipe, *, columns: Columns = DEFAULT_COLUMNS, image_root: str | None = None
) -> Pairs:
    """Pairs for a model that is trained: those of its recipe are read as they were then, where nothing else is said."""
    data = recipe.data
    if source in (data.train, data.val) and columns == DEFAULT_COLUMNS:
        columns, image_root = data.columns, image_root or data.image_root
    return open_pairs(source, columns=columns, image_root=image_root, cache=cache_folder() / "pairs")


def _open(source: str, recipe: Recipe) -> Pairs:
    data = recipe.data
    pairs = open_as_trained(source, recipe)
    if not data.languages:
        return pairs
    kept = [pair for pair in (_spoken_in(pair, data.languages) for pair in pairs) if pair.captions]
    if not kept:
        found = languages_of(pairs)
        raise UserError(
            f"zero pairs: no caption of {source} is in {', '.join(data.languages)} (data.languages); "
            f"its captions are in {', '.join(found) or 'languages it does not name'}"
        )
    return Pairs(source, [kept])


def _spoken_in(pair: Pair, languages: Sequence[str]) -> Pair:
    return replace(pair, captions=tuple(caption for caption in pair.captions if caption.language in languages))


def samples(pairs: Pairs, recipe: Recipe) -> int:
    """How many samples an epoch has."""
    if recipe.data.captions == "draw":
        return len(pairs)
    return sum(len(pairs[number].captions) for number in range(len(pairs)))


def _largest_batch(inputs: Inputs, recipe: Recipe) -> int:
    live = not inputs.all_pooled or (recipe.data.augment is not None and not recipe.data.views)
    return LARGEST_LIVE_BATCH if live else LARGEST_BATCH


def content_hash(listing: Listing, val: Pairs) -> str:
    """A hash of the ids and captions of a run's pairs: other ones would come in another order."""
    digest = hashlib.sha256(json.dumps([listing.ids, listing.texts, [pair.id for pair in val]]).encode())
    for column in (listing.group, listing.first, listing.caption):
        digest.update(column.tobytes())
    return digest.hexdigest()


def _refuse_changes(folder: Run, recipe: Recipe, model: DualEncoder, content: str) -> None:
    """A run goes on with its own recipe, towers and pairs, or not at all: it would end as no run ever would."""
    facts = folder.read()
    folder.refuse_other_bases(model)
    if facts.recipe != recipe.to_dict():
        raise UserError(f"{folder.path} was started with another recipe; a run goes on with its own only")
    if facts.base.get("pairs") != content:
        raise UserError(
            f"{folder.path} cannot go on: the pairs of {recipe.data.train} have changed since it was stopped"
        )


def _unread(sample: Skipped) -> dict[str, str]:
    return {"event": "skipped", **sample._asdict()}
