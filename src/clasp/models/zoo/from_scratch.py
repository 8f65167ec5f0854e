"""Native encoders trained from scratch: ``tower = "own:image"`` and ``tower = "own:text"``.

Input: the settings of ``[image.net]`` or ``[text.net]`` and a seed. Output: a ``Backbone`` with randomly initialised
weights, deterministic in the seed, since a delta depends on its base weights. The text encoder uses CLIP's BPE
vocabulary, whose file comes in a pip package, or one learned from the training captions, which the caller provides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from clasp.data.bpe import CLIP_VOCAB_SIZE, load_clip_bpe
from clasp.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.models.backbone import Backbone
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer, init_weights
from clasp.models.transformer.settings import TextTransformerSettings
from clasp.models.zoo.installed_file import InstalledFile
from clasp.types import UserError

# bpe_simple_vocab_16e6 (MIT), byte for byte that of openai/CLIP
_CLIP_PACKAGE, _CLIP_VERSION = "open_clip_torch", "3.3.0"
_CLIP_FILE = InstalledFile(
    "open_clip/bpe_simple_vocab_16e6.txt.gz", "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
)


def create_backbone_from_scratch(
    settings: ImageTowerSettings | TextTowerSettings, *, seed: int, meta: bool
) -> Backbone:
    """The encoder of these settings, initialised from ``seed``. Raises ``UserError`` for settings that do not fit."""
    side = "image" if isinstance(settings, ImageTowerSettings) else "text"
    if settings.tower != f"own:{side}":
        raise UserError(f"[{side}] tower = {settings.tower!r}: a native encoder is own:{side} there")
    if settings.net is None:
        raise UserError(
            f"[{side}] tower = {settings.tower!r} needs a section [{side}.net] with width, heads, layers, …"
        )
    if isinstance(settings, TextTowerSettings):
        _check_text_net(settings, settings.net)
        net = _initialized(partial(TextTransformer, settings.net), seed, meta)
        pool = "eos" if settings.net.attention == "causal" else "mean"
        tokenizer = partial(load_clip_tokenizer, settings.net.context)
        return Backbone(settings.tower, "text", net, _version(seed), pool, tokenizer=tokenizer, from_seed=True)
    size = settings.net.size
    if settings.size not in (None, size):
        raise UserError(
            f"image.size = {settings.size}: the net of [image.net] is for {size} px; set image.net.size instead"
        )
    net = _initialized(partial(ImageTransformer, settings.net), seed, meta)
    transform = ImageTransform(size, IMAGENET_MEAN, IMAGENET_STD)
    return Backbone(settings.tower, "image", net, _version(seed), "cls", transform, from_seed=True)


def load_clip_tokenizer(max_tokens: int) -> Tokenizer:
    """CLIP's tokenizer, its file verified. Raises ``UserError`` where its package is not installed."""
    return Tokenizer(
        load_clip_bpe(_CLIP_FILE.find("text.vocabulary = 'clip'", _CLIP_PACKAGE, _CLIP_VERSION)), max_tokens=max_tokens
    )


def refuse_net_settings(settings: ImageTowerSettings | TextTowerSettings) -> None:
    """Raises ``UserError`` where a pre-trained tower has settings that only apply to training from scratch."""
    side = "image" if isinstance(settings, ImageTowerSettings) else "text"
    odd = f"[{side}.net]" if settings.net is not None else ""
    if isinstance(settings, TextTowerSettings) and settings.vocabulary is not None:
        odd = f"text.vocabulary = {settings.vocabulary!r}"
    if odd:
        raise UserError(f"{odd} is for tower = 'own:{side}'; {settings.tower!r} comes with its own")


def _initialized(make: Callable[[], nn.Module], seed: int, meta: bool) -> nn.Module:
    with torch.device("meta" if meta else "cpu"), torch.random.fork_rng(devices=[]):
        net = make()
    init_weights(net, seed=seed)
    return net.eval()


def _check_text_net(settings: TextTowerSettings, net: TextTransformerSettings) -> None:
    if settings.vocabulary != "pairs" and net.vocabulary != CLIP_VOCAB_SIZE:
        raise UserError(
            f"text.net.vocabulary = {net.vocabulary}: CLIP has {CLIP_VOCAB_SIZE} word pieces; write that, "
            "or learn others with text.vocabulary = 'pairs'"
        )
    if settings.max_tokens is not None and settings.max_tokens > net.context:
        raise UserError(
            f"text.max_tokens = {settings.max_tokens}: the net of [text.net] has {net.context} positions; take at most "
            "that, or set text.net.context"
        )


def _version(seed: int) -> str:
    return f"drawn from seed {seed}"
