"""The main job: a recipe and its pairs become a run folder.

Opens the pairs and sets a validation part aside, reads frozen towers once, trains the selection, evaluates, and writes
the run with its card. What a person should know on the way is handed to ``say``; nothing is printed here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from clasp.assemble import Assembled, assemble
from clasp.card import card
from clasp.data.batches import Batches
from clasp.data.pairs import Pairs, open_pairs, split
from clasp.data.sides import Listing, LiveImages, LiveTexts, Picks
from clasp.evaluate.questions import Captions
from clasp.evaluate.tasks import Result, Retrieval
from clasp.inputs import Bar, Inputs, no_bar
from clasp.losses import LOSSES
from clasp.model import DualEncoder
from clasp.nn.towers import Tower
from clasp.recipe import Recipe
from clasp.train.checkpoint import Run
from clasp.train.closed import cca
from clasp.train.loop import Fitted, choose, fit
from clasp.train.progress import Reporter, Silent
from clasp.types import ImageInput, Pair, Pixels, Pooled, TextInput, Tokens, UserError

Say = Callable[[str], None]

LARGEST_LIVE_BATCH = 128  # where a tower is run in every step, its activations have to fit


@dataclass(frozen=True, slots=True)
class Aligned:
    """What came of a run."""

    run: Path
    fitted: Fitted
    results: list[Result]
    delta_bytes: int


def cache_folder() -> Path:
    """Where what can be computed again is kept: ``$CLASP_CACHE``, else ``~/.cache/clasp``."""
    return Path(os.environ.get("CLASP_CACHE") or Path.home() / ".cache" / "clasp")


def align(
    recipe: Recipe, run: Path, *, say: Say, bar: Bar = no_bar, reporter: Reporter | None = None, resume: bool = False
) -> Aligned:
    """Train a recipe into the folder ``run``; with ``resume``, go on where it stopped.

    Raises ``UserError`` for anything the user can mend, as early as it can be known.
    """
    if recipe.data.train is None:
        raise UserError("no pairs to train on: set data.train to a folder, a .csv .tsv .jsonl .parquet file or tar shards")
    folder = Run(run)
    train, val = training_pairs(recipe)
    parts = assemble(recipe)
    parts.model.to(PartialState().device).eval()
    inputs = inputs_of(parts, recipe, bar=bar)
    plan = choose(recipe.train, samples(train, recipe), largest=_largest_batch(inputs, recipe))
    say(plan.reason)
    settled = recipe.model_copy(update={"train": plan.resolved(recipe.train)})
    if resume:
        _same_recipe(folder, settled)
    else:
        folder.start(settled.to_toml(), parts.model, parts.transform, parts.tokenizer)
    return _train(settled, folder, parts.model, inputs, train, val, reporter or Silent(), resume)


def training_pairs(recipe: Recipe) -> tuple[Pairs, Pairs]:
    """The pairs to train on and to validate on, filtered by language."""
    data = recipe.data
    assert data.train is not None
    pairs = _open(data.train, recipe)
    if data.val is not None:
        return pairs, _open(data.val, recipe)
    return split(pairs, data.val_fraction)


def inputs_of(parts: Assembled, recipe: Recipe, *, bar: Bar = no_bar) -> Inputs:
    """The reader of pairs for a model that has just been built from a recipe."""
    model, auto = parts.model, recipe.data.features == "auto"
    return Inputs(
        image=model.image,
        text=model.text,
        transform=parts.transform,
        tokenizer=parts.tokenizer,
        image_frozen=auto and not any(name.startswith("image.") for name in model.selection),
        text_frozen=auto and not any(name.startswith("text.") for name in model.selection),
        cache=cache_folder(),
        bar=bar,
        workers=recipe.train.workers,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )


def retrieval(pairs: Pairs, inputs: Inputs, *, data: str, resamples: int = 1000) -> Retrieval:
    """Captions by image and images by caption, over all captions of ``pairs``."""
    listed = [pairs[number] for number in range(len(pairs))]
    captions = {f"{pair.id}#{n}": (caption.text, pair.group) for pair in listed for n, caption in enumerate(pair.captions)}
    question = Captions(
        image_groups={pair.id: pair.group for pair in listed},
        text_groups={key: group for key, (_, group) in captions.items()},
        texts=inputs.texts({key: text for key, (text, _) in captions.items()}),
    )
    return Retrieval(data=data, images=inputs.images(pairs), question=question, resamples=resamples)


# --- the steps -------------------------------------------------------------------------------------------------------


def _train(
    recipe: Recipe,
    folder: Run,
    model: DualEncoder,
    inputs: Inputs,
    train: Pairs,
    val: Pairs,
    reporter: Reporter,
    resume: bool,
) -> Aligned:
    settings = recipe.train
    listing = Listing(train)
    image_side, text_side = inputs.image_side(train, recipe.data.augment), inputs.text_side(listing)
    if not resume:
        _start_heads(model, inputs, train, listing, recipe)
    assert settings.batch != "auto"
    batches = Batches(
        listing,
        image_side,
        text_side,
        batch=settings.batch,
        seed=settings.seed,
        workers=0 if inputs.image_frozen else settings.workers,
        captions=recipe.data.captions,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )
    task = retrieval(val, inputs, data="validation")

    fitted = fit(
        model,
        batches,
        LOSSES[recipe.loss.kind],
        settings,
        log=lambda row: folder.append("log.jsonl", [row]),
        evaluate=lambda: task(model),
        primary=task.primary,
        save=folder.save_state,
        start=folder.read_state() if resume else None,
        towers=("image.", "text."),
        reporter=reporter,
    )
    batches.close()
    delta_bytes = folder.save(model)
    results = [] if fitted.interrupted else task.results(model)
    folder.append("results.jsonl", [asdict(row) for row in results])
    folder.write("README.md", card(recipe, model, folder.path, fitted, results, len(train), len(val)))
    return Aligned(folder.path, fitted, results, delta_bytes)


def _open(source: str, recipe: Recipe) -> Pairs:
    data = recipe.data
    pairs = open_pairs(source, columns=data.columns, image_root=data.image_root, cache=cache_folder() / "pairs")
    if not data.languages:
        return pairs
    kept = [pair for pair in (_spoken_in(pair, data.languages) for pair in pairs) if pair.captions]
    if not kept:
        found = sorted({caption.language for pair in pairs for caption in pair.captions} - {""})
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
    live = not inputs.text_frozen or not inputs.image_frozen or recipe.data.augment is not None
    return LARGEST_LIVE_BATCH if live else 1024


def _start_heads(model: DualEncoder, inputs: Inputs, pairs: Pairs, listing: Listing, recipe: Recipe) -> None:
    """Let the heads start from the training pairs: their mean and deviation, then, if asked for, the closed form."""
    if not recipe.head.standardize:
        return
    pooled = _Pooled(model, inputs, pairs, listing)
    some = pooled.rows(np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), 2048)).astype(np.int64)), draw=0)
    heads = model.image_head, model.text_head
    for head, features in zip(heads, some, strict=True):
        assert head.standardize is not None
        head.standardize.start_from(features)
    if recipe.head.start == "cca":
        captions = np.diff(listing.first)
        every = [np.flatnonzero(captions > draw) for draw in range(int(captions.max()))]
        batches = (
            tuple(head.standardize(rows) for head, rows in zip(heads, pooled.rows(part, draw), strict=True))
            for draw, numbers in enumerate(every)
            for part in np.array_split(numbers, -(-len(numbers) // 4096))
        )
        with torch.no_grad():
            maps = cca(batches, recipe.head.width, ridge=recipe.head.ridge)
            for head, weight in zip(heads, (maps.image, maps.text), strict=True):
                head.map.weight.copy_(weight)
                head.map.bias.zero_()


class _Pooled:
    """Both towers' pooled output for chosen pairs, each with its caption number ``draw``."""

    def __init__(self, model: DualEncoder, inputs: Inputs, pairs: Pairs, listing: Listing):
        self.model, self.listing = model, listing
        self.image = inputs.image_side(pairs, None) if inputs.image_frozen else LiveImages(inputs.transform)
        self.text = inputs.text_side(listing) if inputs.text_frozen else LiveTexts(inputs.tokenizer)

    def rows(self, numbers: np.ndarray, draw: int) -> tuple[Tensor, Tensor]:
        """Aligned features ``[n Di]`` and ``[n Dt]`` of the pairs that can be read."""
        images, texts = [], []
        for start in range(0, len(numbers), 256):
            part = numbers[start : start + 256]
            picks = Picks(part, np.full(len(part), draw), np.zeros(len(part), dtype=np.int64))
            seen = self.image(picks, lambda number: self.listing[number])
            images.append(self._pooled(self.model.image, seen.inputs))
            read = self.text(picks[seen.kept], lambda number: self.listing[number])
            texts.append(self._pooled(self.model.text, read.inputs))
        return torch.cat(images), torch.cat(texts)

    @torch.no_grad()
    def _pooled(self, tower: Tower, inputs: ImageInput | TextInput) -> Tensor:
        device = next(tower.parameters()).device
        if isinstance(inputs, Pooled):
            return inputs.values.to(device)
        return tower.pooled(_moved(inputs, device))


def _moved(inputs: Pixels | Tokens, device: torch.device) -> Pixels | Tokens:
    if isinstance(inputs, Pixels):
        return Pixels(inputs.values.to(device))
    return Tokens(inputs.ids.to(device), inputs.mask.to(device))


def _same_recipe(folder: Run, recipe: Recipe) -> None:
    then: Mapping[str, Any] = folder.read().recipe
    if then != recipe.to_dict():
        raise UserError(f"{folder.path} was started with another recipe; a run goes on with its own only")

