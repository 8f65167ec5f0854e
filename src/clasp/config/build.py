"""Build the model of a recipe (backbones, towers, tuning, heads), and load the model of a run folder.

Input: a ``Recipe`` or a run folder. Output: a ``DualEncoder`` with its image transform and tokenizer. This is the only
place that assembles a ``DualEncoder``. Note: with ``meta=True`` only shapes exist, which is all that counting needs.
Long, since a recipe and a run folder are built by the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from clasp.config.memory_check import require_memory
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.data.bpe import train_bpe
from clasp.data.cache_folder import cache_folder
from clasp.data.caption_ids import TokenizerSettings
from clasp.data.images import ImageTransform
from clasp.data.loader import log_skipped
from clasp.data.tokenizer import Tokenizer
from clasp.models.backbone import Backbone
from clasp.models.cache_policy import CachePolicy
from clasp.models.dual_encoder import DualEncoder
from clasp.models.feature_settings import FeatureCallbacks, FeatureSettings
from clasp.models.features import FeatureSource
from clasp.models.heads import HEAD_MAPS
from clasp.models.inference import EmbeddingModel, EncoderPrecision
from clasp.models.precision import PrecisionChoice, frozen_precision, resolve_precision
from clasp.models.sharing.backbones import share_backbones
from clasp.models.sharing.policy import SharingPlan
from clasp.models.sharing.tie import tie_parameters
from clasp.models.structure import learned_positions
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.tuning.prompts import positions_of_prompts
from clasp.models.zoo.hub_runs import fetch_run
from clasp.models.zoo.registry import load_backbone
from clasp.models.zoo.single_trunk import build_single_trunk
from clasp.plain_types import Precision
from clasp.training import run_code, run_folder
from clasp.training.class_pairs import WeightedClassPairs, find_class_pairs
from clasp.training.losses import find_loss
from clasp.types import MessageCallback, ProgressFactory, SkippedSample, UserError, no_progress_bar


@dataclass(frozen=True, slots=True)
class ModelAndPreprocessing:
    """A model with its image transform and tokenizer."""

    model: DualEncoder
    transform: ImageTransform
    tokenizer: Tokenizer


def build_model(recipe: Recipe, *, meta: bool = False) -> DualEncoder:
    """The model of a recipe, with its trainable parameters selected. ``meta=True``: shapes only, nothing loaded.

    Raises ``UserError`` for a tower that cannot be opened, a method that matches nothing, and when nothing trains.
    """
    return _assemble(recipe, _open_backbones(recipe, meta=meta))


def build_model_and_preprocessing(
    recipe: Recipe, captions: Callable[[], Iterable[str]] | None = None
) -> ModelAndPreprocessing:
    """The model of a recipe with its weights, its image transform and its tokenizer. Raises ``UserError`` as above.

    ``captions`` returns the training captions, from which ``text.vocabulary = "pairs"`` is learned.
    """
    backbones = _open_backbones(recipe, meta=False)
    transform, tokenizer = _transform(recipe, backbones.image), _tokenizer(recipe, backbones.text, captions)
    model = _assemble(recipe, backbones)
    if recipe.image.patch_dropout:
        model.image.enable_patch_dropout(recipe.image.patch_dropout)
    return ModelAndPreprocessing(model, transform, tokenizer)


def _assemble(recipe: Recipe, backbones: _Backbones) -> DualEncoder:
    """Assemble the model: towers, heads, tuning, selection of the trainable parameters."""
    image, text = _build_towers(recipe, backbones)
    model = _add_heads(recipe, image, text)
    tuned = _tune_towers(recipe, model)
    _select(recipe, model, tuned)
    model.sharing = backbones.sharing
    _check_micro_batch(recipe, model)
    _check_positions(recipe, model.text)
    return model


def rebuild_heads(parts: ModelAndPreprocessing, recipe: Recipe) -> ModelAndPreprocessing:
    """Bitwise the same as ``build_model_and_preprocessing(recipe)``, reusing the towers of ``parts``.

    These must be the towers of ``recipe`` and wholly frozen."""
    image, text = parts.model.image, parts.model.text
    assert image.fully_frozen and text.fully_frozen and image.pooling is None and text.pooling is None
    made = join_frozen_towers((image, parts.transform), (text, parts.tokenizer), recipe)
    made.model.sharing = parts.model.sharing
    return made


def build_image_tower(recipe: Recipe) -> tuple[Tower, ImageTransform]:
    """The image tower of a recipe without the text tower, untuned. Raises ``UserError`` where it cannot be opened."""
    backbone = _load_backbone(recipe.image, recipe.train.seed, meta=False)
    return _tower(backbone, recipe.image), _transform(recipe, backbone)


def build_text_tower(recipe: Recipe) -> tuple[Tower, Tokenizer]:
    """The text tower of a recipe without the image tower, untuned. Raises ``UserError`` where it cannot be opened."""
    backbone = _load_backbone(recipe.text, recipe.train.seed + 1, meta=False)
    return _tower(backbone, recipe.text), _tokenizer(recipe, backbone, None)


def join_frozen_towers(
    image: tuple[Tower, ImageTransform], text: tuple[Tower, Tokenizer], recipe: Recipe
) -> ModelAndPreprocessing:
    """Two towers, which are frozen, with the untrained heads of a recipe; a tower may be in several models."""
    model = _add_heads(recipe, image[0], text[0])
    _select(recipe, model, set())
    return ModelAndPreprocessing(model, image[1], text[1])


def load(
    run: str | Path,
    *,
    device: str = "cpu",
    precision: Literal["auto"] | Precision | None = None,
    allow_code: bool = False,
) -> EmbeddingModel:
    """The model of a run folder, or of ``hf:USER/NAME`` on the hub, in evaluation mode.

    A run is data: Python code that its recipe names (``package.module:factory``) is imported with ``allow_code`` only.
    Loads the base weights that the recipe names, verifies them against the recorded hashes by tensor name, then loads
    the delta. Bitwise the model that was saved. ``precision``: what towers compute in, in place of ``train.precision``
    of its recipe; "auto": bfloat16 where that is faster, and convolutional towers in float32. Raises ``UserError``.
    """
    choices = (None, "auto", *get_args(Precision))
    if precision not in choices:
        raise UserError(f"precision = {precision!r} is not one of {', '.join(map(repr, choices))}")
    folder = run_folder.RunFolder(fetch_run(run))
    with run_code.allow_code(None if allow_code else ()):
        facts = folder.read()
        recipe = recipe_from_dict(facts.recipe, str(folder.path / "recipe.toml"))
        parts = ModelAndPreprocessing(build_model(recipe), facts.transform, facts.tokenizer)
        folder.load_delta(parts.model)
    resolved = resolve_precision(precision or recipe.train.precision, torch.device(device)).precision
    sides = EncoderPrecision(
        image=frozen_precision(resolved, convolutional=parts.model.image.convolutional),
        text=frozen_precision(resolved, convolutional=parts.model.text.convolutional),
    )
    model = parts.model.to(device).eval()
    return EmbeddingModel(model, parts.transform, parts.tokenizer, device=device, precision=sides)


def with_untrained_heads(model: DualEncoder, recipe: Recipe) -> DualEncoder:
    """The same towers with untrained heads, as a baseline."""
    return _add_heads(recipe, model.image, model.text).eval()


# --- assembly --------------------------------------------------------------------------------------------------------


class _Backbones(NamedTuple):
    """The backbones of both towers, and the weight sharing between them."""

    image: Backbone
    text: Backbone
    sharing: SharingPlan | None


def _open_backbones(recipe: Recipe, *, meta: bool) -> _Backbones:
    """Both backbones, with the recipe's weight sharing; untrained nets are initialised from its seed."""
    seed = recipe.train.seed
    image = _load_backbone(recipe.image, seed, meta=meta)
    text = _load_backbone(recipe.text, seed + 1, meta=meta)
    if recipe.share is None:
        return _Backbones(image, text, None)
    image, text = replace(image, weight_hashes=None), replace(text, weight_hashes=None)  # sharing writes to weights
    policy, trunk = recipe.share.policy, recipe.share.trunk_settings
    if trunk is None:
        return _Backbones(image, text, share_backbones(image, text, policy, seed=seed + 2))
    untrained = next((base.name for base in (image, text) if base.from_seed), None)
    if untrained is not None:
        raise UserError(
            f"share.trunk = {trunk.trunk!r} runs both modalities through a pre-trained tower, and {untrained} is not; "
            "leave share.trunk out, or write another tower"
        )
    made = build_single_trunk(image, text, trunk, policy, seed=seed + 2)
    image = replace(made.image, new_parameters=made.image_new)
    return _Backbones(image, replace(made.text, new_parameters=made.text_new), made.sharing)


def _load_backbone(settings: ImageTowerSettings | TextTowerSettings, seed: int, *, meta: bool) -> Backbone:
    """The backbone of a tower. Raises ``UserError`` where a net that the recipe sizes does not fit into memory."""
    if settings.net is not None and not meta:
        sized, side = load_backbone(settings, meta=True, seed=seed), settings.tower.partition(":")[2]
        require_memory(sized.net, f"[{side}.net]", "lower its width, hidden, layers, vocabulary or context")
    return load_backbone(settings, meta=meta, seed=seed)


def _build_towers(recipe: Recipe, backbones: _Backbones) -> tuple[Tower, Tower]:
    """Both towers around their backbones; learned pooling is initialised at random from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        return _tower(backbones.image, recipe.image), _tower(backbones.text, recipe.text)


def _tower(base: Backbone, settings: ImageTowerSettings | TextTowerSettings) -> Tower:
    return Tower(
        base,
        pool=settings.pool,
        layer=settings.layer,
        extra_layers=settings.extra_layers,
        dropout=settings.dropout,
    )


def _add_heads(recipe: Recipe, image: Tower, text: Tower) -> DualEncoder:
    """Both towers with untrained heads. Raises ``UserError`` where these do not fit into memory."""
    with torch.device("meta"):
        sized = nn.ModuleList(HEAD_MAPS[recipe.head.kind](tower.width, recipe.head) for tower in (image, text))
    require_memory(sized, "the heads", "lower head.width or head.hidden")
    model = DualEncoder(
        image,
        text,
        recipe.head,
        seed=recipe.train.seed,
        logits=recipe.loss,
        init_logit_bias=find_loss(recipe.loss.kind).init_logit_bias,
    )
    if recipe.share is not None and recipe.share.head == "shared":
        if image.width != text.width:
            raise UserError(
                f"share.head = 'shared': the image tower is {image.width} wide and the text tower {text.width}; one "
                "head is for equal widths"
            )
        tie_parameters(model.image_head, model.text_head)
    return model


def _tune_towers(recipe: Recipe, model: DualEncoder) -> set[str]:
    """Insert the modules of the tuning specs; returns the names of the trainable parameters of the towers."""
    selection: set[str] = set()
    sides = (("image", model.image, recipe.tune.image), ("text", model.text, recipe.tune.text))
    for number, (name, tower, methods) in enumerate(sides, 1):
        selection |= {f"{name}.{parameter}" for parameter in tower.tune(methods, seed=recipe.train.seed + number)}
        selection |= {f"{name}.net.{parameter}" for parameter in tower.new_parameters}
    return selection


def _select(recipe: Recipe, model: DualEncoder, in_towers: set[str]) -> None:
    """Select the trainable parameters: those in the towers, and heads and logit scale as the recipe sets."""
    selection = set(in_towers)
    for part, choice in (("heads", recipe.tune.head), ("scale", recipe.tune.scale)):
        if choice == "full":
            selection |= model.new_parameter_names[part]
    if not selection:
        raise UserError("nothing trains: tune.image, tune.text, tune.head and tune.scale are all none")
    model.select(selection)


def _check_micro_batch(recipe: Recipe, model: DualEncoder) -> None:
    """Raise ``UserError`` for micro-batches with BatchNorm: its statistics must be of whole batches."""
    micro_batch, batch = recipe.train.micro_batch, recipe.train.batch_size
    if model.moving and micro_batch != "auto" and (batch == "auto" or micro_batch < batch):
        raise UserError(
            f"train.micro_batch = {micro_batch}: BatchNorm in {recipe.image.tower} takes its statistics of whole "
            "batches; leave micro_batch out, or choose norms without: image.net.stem = 'group', "
            "image.net.branch.kind = 'gated'"
        )


def _check_positions(recipe: Recipe, text: Tower) -> None:
    """Raise ``UserError`` where captions of ``text.max_tokens``, with the prompts before them, have no positions."""
    positions, prompts = learned_positions(text.net), positions_of_prompts(text.net)
    if positions is None:
        return
    tokens = recipe.text.max_tokens or min(TokenizerSettings().max_tokens, positions)
    if tokens + prompts > positions:
        raise UserError(
            f"text.max_tokens = {tokens}{f' with {prompts} prompts' if prompts else ''}: {text.name} has positions for "
            f"{positions} tokens; at most {max(positions - prompts, 0)}"
        )


# --- preprocessing ---------------------------------------------------------------------------------------------------


def _transform(recipe: Recipe, image: Backbone) -> ImageTransform:
    assert image.transform is not None
    names = ("size", "resize", "background", "mean", "std")
    changes: dict[str, Any] = {name: value for name, value in recipe.image if name in names and value is not None}
    if recipe.image.resize in ("squash", "pad"):
        changes["crop_fraction"] = 1.0  # the whole image is used
    return replace(image.transform, **changes)


def _tokenizer(recipe: Recipe, text: Backbone, captions: Callable[[], Iterable[str]] | None) -> Tokenizer:
    assert text.tokenizer is not None
    learned = recipe.text.vocabulary == "pairs"
    tokenizer = (_learn_tokenizer(recipe, captions) if learned else text.tokenizer()).with_settings(
        prefix=recipe.text.prefix,
        max_tokens=recipe.text.max_tokens,
        clean=recipe.text.clean,
        template=recipe.text.template,
        truncation=recipe.text.truncation,
    )
    _check_end_token(recipe, text, tokenizer)
    return tokenizer


def _learn_tokenizer(recipe: Recipe, captions: Callable[[], Iterable[str]] | None) -> Tokenizer:
    assert captions is not None, "a vocabulary is learned from captions, which a caller that trains must pass"
    assert recipe.text.net is not None
    return Tokenizer(train_bpe(captions(), recipe.text.net.vocabulary), max_tokens=recipe.text.net.context)


def _check_end_token(recipe: Recipe, text: Backbone, tokenizer: Tokenizer) -> None:
    if (recipe.text.pool or text.pool) == "eos":
        ends = {row[-1] for row in tokenizer.encode(["a", "two words"])}
        if len(ends) != 1:
            raise UserError(
                f"text.pool = 'eos': the tokenizer of {text.name} ends no text with an end token; use last or mean"
            )


def class_pairs_of_recipe(recipe: Recipe, model: DualEncoder) -> WeightedClassPairs | None:
    """The class pairs that count in the closed form of a recipe; ``None`` where its heads start otherwise.

    Raises ``UserError`` where the recipe wants class pairs that its image tower does not have.
    """
    closed_form = recipe.head.init == "cca" and recipe.train.starts_heads
    found = find_class_pairs(model, recipe.data.class_weight) if closed_form else None
    if recipe.data.class_ratio is not None and found is None:
        raise UserError(
            f"data.class_ratio = {recipe.data.class_ratio:g}: there are no class pairs, since "
            + (
                f"{model.image.name} has no classifier with names for image.pool"
                if closed_form
                else "the heads start from train.init_from"
            )
        )
    return found


class CacheFolders(NamedTuple):
    """Folders of features: ``usual``, where it is another than that of all runs, and that of towers that were tuned and
    are frozen now."""

    usual: Path | None = None
    tuned: Path | None = None


def build_feature_source(
    parts: ModelAndPreprocessing,
    recipe: Recipe,
    *,
    precision: PrecisionChoice | None = None,
    bar: ProgressFactory = no_progress_bar,
    say: MessageCallback = lambda line: None,
    report: Callable[[Iterable[SkippedSample]], None] = log_skipped,
    folders: CacheFolders | None = None,
) -> FeatureSource:
    """The ``FeatureSource`` of a model built from a recipe; ``precision``: another than the recipe's, ``folders``: of
    features, where they are not cached as usual."""
    usual, tuned = folders or CacheFolders()
    settings = FeatureSettings(
        cache=CachePolicy(usual or cache_folder(), recipe.data.feature_cache),
        tuned=CachePolicy(tuned, recipe.data.feature_cache) if tuned else None,
        workers=recipe.train.workers,
        cached_augmentations=recipe.data.cached_augmentations,
        seed=recipe.train.seed,
        max_bad_fraction=recipe.data.max_bad_fraction,
        precision=precision or resolve_precision(recipe.train.precision, next(parts.model.parameters()).device),
    )
    return FeatureSource(
        parts.model.image,
        parts.model.text,
        transform=parts.transform,
        tokenizer=parts.tokenizer,
        settings=settings,
        callbacks=FeatureCallbacks(bar=bar, notify=say, on_skipped=report),
    )
