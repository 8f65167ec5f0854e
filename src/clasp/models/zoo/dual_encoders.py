"""An existing CLIP or SigLIP of ``transformers`` as both towers: ``tower = "clip:NAME"``, a repository or a folder.

Input: ``[image]`` or ``[text]`` of a recipe. Output: the half of that modality as a ``Backbone``, with its projection,
the logit scale and the logit bias as its ``PretrainedHead``; with ``head.init = "pretrained"`` the embeddings before
training are those of the original. Note: the whole checkpoint is read for each half, since the projections are in no
half alone. ``hf:NAME`` opens the same half without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clasp.data.tokenizer import Tokenizer
from clasp.models.backbone import Backbone, ImageTowerSettings, PretrainedHead, TextTowerSettings
from clasp.models.zoo.huggingface import load_config, read_encoder, require_weights, translate_hub_errors
from clasp.types import UserError

_MAX_CONTEXT = 77
"""Longest captions by default, in tokens: CLIP's"""


class _Family(NamedTuple):
    """A class of ``transformers`` with ``vision_model`` and ``text_model``, and the paths of its projections."""

    class_name: str
    projections: tuple[str | None, str | None]
    """image, text; ``None``: the pooled vector is the embedding"""


_PROJECTIONS = ("visual_projection.weight", "text_projection.weight")
DUAL_ENCODER_FAMILIES: dict[str, _Family] = {
    "clip": _Family("CLIPModel", _PROJECTIONS),
    "chinese_clip": _Family("ChineseCLIPModel", _PROJECTIONS),
    "metaclip_2": _Family("MetaClip2Model", _PROJECTIONS),
    "siglip": _Family("SiglipModel", (None, None)),  # SigLIP 2 at one image size too
}
"""by ``model_type``"""


def load_dual_encoder_half(name: str, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> Backbone:
    """The half of the dual encoder at ``name``; see ``clasp.models.zoo.registry.load_backbone``."""
    folder = Path(name).expanduser()
    place = str(folder) if folder.is_dir() else name
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"tower = {settings.tower!r}: {folder} has no config.json, so it is no CLIP that was saved")
    with translate_hub_errors(settings.tower):
        config = load_config(place, meta)
        if config.model_type not in DUAL_ENCODER_FAMILIES:
            raise UserError(
                f"tower = {settings.tower!r} is {config.model_type}, which is no dual encoder; clip: opens "
                f"{', '.join(DUAL_ENCODER_FAMILIES)}; for one encoder write hf:{name}"
            )
        whole = _load_whole(place, config, settings, meta)
        return half_of(whole, place, settings, meta)


def half_of(whole: Any, place: str, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> Backbone:
    """The image or the text half of a dual encoder of ``transformers``; ``place`` holds its preprocessing."""
    side = 0 if isinstance(settings, ImageTowerSettings) else 1
    net = (whole.vision_model, whole.text_model)[side]
    base = read_encoder(place, whole.config, net.eval(), settings, meta)
    projection = DUAL_ENCODER_FAMILIES[whole.config.model_type].projections[side]
    parameters = dict(whole.named_parameters())
    head = PretrainedHead(
        None if projection is None else parameters[projection].detach(),
        parameters["logit_scale"].detach().reshape(()),
        parameters["logit_bias"].detach().reshape(()) if "logit_bias" in parameters else None,
    )
    longest = min(_MAX_CONTEXT, whole.config.text_config.max_position_embeddings)
    tokenizer = base.tokenizer
    whole_texts = None if tokenizer is None else lambda: _up_to(longest, tokenizer)
    return replace(base, pretrained_head=head, tokenizer=whole_texts)


def _up_to(longest: int, load: Callable[[], Tokenizer]) -> Tokenizer:
    tokenizer = load()
    return tokenizer.with_settings(max_tokens=max(longest, tokenizer.max_tokens))


def _load_whole(name: str, config: Any, settings: ImageTowerSettings | TextTowerSettings, meta: bool) -> Any:
    import transformers

    family = getattr(transformers, DUAL_ENCODER_FAMILIES[config.model_type].class_name)
    if meta:
        with torch.device("meta"):
            return family(config)
    whole, facts = family.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    require_weights(facts["missing_keys"], settings)
    return whole
