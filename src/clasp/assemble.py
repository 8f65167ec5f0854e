"""A recipe's objects: bases, towers, tuning, heads; and a run folder back to a model that is ready to use.

The only place that knows how a ``DualEncoder`` is made. With ``meta=True`` nothing but shapes exists, which is all that
counting needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clasp.data.images import ImageTransform
from clasp.data.text import Tokenizer
from clasp.embed import Model
from clasp.model import DualEncoder
from clasp.nn.base import Base, ImageSettings, TextSettings
from clasp.nn.foreign.hub import open_base
from clasp.nn.towers import Tower
from clasp.recipe import Recipe, from_dict
from clasp.train import checkpoint
from clasp.types import UserError


@dataclass(frozen=True, slots=True)
class Assembled:
    """A model and what stands before its towers."""

    model: DualEncoder
    transform: ImageTransform
    tokenizer: Tokenizer


def build(recipe: Recipe, *, meta: bool = False) -> DualEncoder:
    """The model of a recipe, with its selection made. ``meta=True``: shapes only, nothing loaded.

    Raises ``UserError`` for a tower that cannot be opened, a method that matches nothing, and when nothing trains.
    """
    return _model(recipe, open_base(recipe.image, meta=meta), open_base(recipe.text, meta=meta))


def assemble(recipe: Recipe) -> Assembled:
    """The model of a recipe with its weights, its image transform and its tokenizer. Raises ``UserError`` as above."""
    image, text = open_base(recipe.image), open_base(recipe.text)
    assert image.transform is not None and text.tokenizer is not None
    names = ("size", "resize", "ground", "mean", "std")
    changes: dict[str, Any] = {name: value for name, value in recipe.image if name in names and value is not None}
    if recipe.image.resize in ("squash", "pad"):
        changes["crop_fraction"] = 1.0  # the whole picture is shown
    transform = replace(image.transform, **changes)
    tokenizer = text.tokenizer().with_settings(
        prefix=recipe.text.prefix,
        max_tokens=recipe.text.max_tokens,
        clean=recipe.text.clean,
        template=recipe.text.template,
    )
    _check_end_token(recipe, text, tokenizer)
    return Assembled(_model(recipe, image, text), transform, tokenizer)


def under_other_heads(parts: Assembled, recipe: Recipe) -> Assembled:
    """What ``assemble(recipe)`` gives, bitwise, around the towers of ``parts``, which are those of ``recipe`` and as
    they were loaded: nothing in them trained or trains."""
    image, text = parts.model.image, parts.model.text
    assert image.wholly_frozen and text.wholly_frozen and image.pooling is None and text.pooling is None
    model = _between(image, text, recipe)
    _select(model, recipe, set())
    return replace(parts, model=model)


def load(run: str | Path, *, device: str = "cpu") -> Model:
    """The model of a run folder, in evaluation mode.

    Rebuilds the bases from where the recipe found them and refuses weights that are not the ones trained on, by name
    and hash; then puts the delta in. Bitwise the model that was saved. Raises ``UserError``.
    """
    folder = checkpoint.Run(run)
    facts = folder.read()
    recipe = from_dict(facts.recipe, str(folder.path / "recipe.toml"))
    parts = Assembled(build(recipe), facts.transform, facts.tokenizer)
    folder.restore(parts.model)
    return Model(parts.model.to(device).eval(), parts.transform, parts.tokenizer, device=device)


def with_fresh_heads(model: DualEncoder, recipe: Recipe) -> DualEncoder:
    """The same towers under heads that nobody has trained: what a result is to be compared with."""
    return _between(model.image, model.text, recipe).eval()


def _model(recipe: Recipe, image: Base, text: Base) -> DualEncoder:
    seed = recipe.train.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a learned pooling starts at random
        towers = {
            "image": _tower(image, recipe.image),
            "text": _tower(text, recipe.text),
        }
    model = _between(towers["image"], towers["text"], recipe)
    selection: set[str] = set()
    for number, (name, tower) in enumerate(towers.items(), 1):
        methods = recipe.tune.image if name == "image" else recipe.tune.text
        selection |= {f"{name}.{parameter}" for parameter in tower.tune(methods, seed=seed + number)}
    _select(model, recipe, selection)
    return model


def _between(image: Tower, text: Tower, recipe: Recipe) -> DualEncoder:
    loss, seed = recipe.loss, recipe.train.seed
    return DualEncoder(image, text, recipe.head, loss=loss.kind, logits=loss, seed=seed)


def _select(model: DualEncoder, recipe: Recipe, in_towers: set[str]) -> None:
    selection = set(in_towers)
    for part, choice in (("heads", recipe.tune.head), ("scale", recipe.tune.scale)):
        if choice == "full":
            selection |= model.new_names[part]
    if not selection:
        raise UserError("nothing trains: tune.image, tune.text, tune.head and tune.scale are all none")
    model.select(selection)


def _tower(base: Base, settings: ImageSettings | TextSettings) -> Tower:
    return Tower(
        base,
        pool=settings.pool,
        layer=settings.layer,
        more_layers=settings.more_layers,
        dropout=settings.dropout,
    )


def _check_end_token(recipe: Recipe, text: Base, tokenizer: Tokenizer) -> None:
    if (recipe.text.pool or text.pool) == "eos":
        ends = {row[-1] for row in tokenizer.encode(["a", "two words"])}
        if len(ends) != 1:
            raise UserError(
                f"text.pool = 'eos': the tokenizer of {text.name} ends no text with an end token; use last or mean"
            )
