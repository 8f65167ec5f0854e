"""An existing CLIP or SigLIP of ``transformers`` as both towers: ``tower = "clip:NAME"``, a repository or a folder.

Input: ``[image]`` or ``[text]`` of a recipe. Output: the half of that modality as a ``Backbone``, with its projection,
the logit scale and the logit bias as its ``PretrainedHead``; with ``head.init = "pretrained"`` the embeddings before
training are those of the original. Note: the whole checkpoint is read for each half, since the projections are in no
half alone. ``hf:NAME`` opens the same half without them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clasp.data.tokenizer import Tokenizer
from clasp.models.backbone import Backbone, PretrainedHead
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
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
    folder = Path(os.path.expanduser(name))
    place = str(folder) if folder.is_dir() else name
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"tower = {settings.tower!r}: {folder} has no config.json, so it is not a saved CLIP")
    with translate_hub_errors(settings.tower):
        config = load_config(place, meta)
        if config.model_type not in DUAL_ENCODER_FAMILIES:
            raise UserError(
                f"tower = {settings.tower!r} is {config.model_type}, and clip: opens dual encoders of the families "
                f"{', '.join(DUAL_ENCODER_FAMILIES)}; for one encoder write hf:{name}"
            )
        if meta:
            whole = build_dual_encoder(config, None, settings)
        else:
            family = _class_of(config)
            whole, facts = family.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
            require_weights(facts["missing_keys"], settings)
        net = whole.vision_model if isinstance(settings, ImageTowerSettings) else whole.text_model
        base = read_encoder(place, config, net.eval(), settings, meta)
    context = min(_MAX_CONTEXT, config.text_config.max_position_embeddings)
    load = base.tokenizer
    return as_half(base, whole, None if load is None else lambda: _up_to(context, load()))


def build_dual_encoder(
    config: Any, tensors: Mapping[str, Tensor] | None, settings: ImageTowerSettings | TextTowerSettings
) -> Any:
    """A dual encoder of ``transformers`` with these tensors, or on the meta device for ``None``.

    Raises ``UserError`` for names that are missing and for tensors of other shapes.
    """
    family = _class_of(config)
    if tensors is None:
        with torch.device("meta"):
            return family(config)
    shapes = {name: p.shape for name, p in build_dual_encoder(config, None, settings).named_parameters()}
    require_weights(shapes.keys() - tensors.keys(), settings)
    odd = next((name for name, tensor in tensors.items() if tensor.shape != shapes.get(name)), None)
    if odd is not None:
        raise UserError(
            f"tower = {settings.tower!r}: {odd} is {tuple(tensors[odd].shape)} in its weights, and "
            f"{tuple(shapes.get(odd, ()))} by its configuration"
        )
    return family.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=torch.float32)


def as_half(base: Backbone, whole: Any, tokenizer: Callable[[], Tokenizer] | None) -> Backbone:
    """``base``, the image or the text half of ``whole``, with its projection, and the logit scale and bias."""
    projection = DUAL_ENCODER_FAMILIES[whole.config.model_type].projections[("image", "text").index(base.modality)]
    parameters = dict(whole.named_parameters())
    head = PretrainedHead(
        None if projection is None else parameters[projection].detach(),
        parameters["logit_scale"].detach().reshape(()),
        parameters["logit_bias"].detach().reshape(()) if "logit_bias" in parameters else None,
    )
    return replace(base, pretrained_head=head, tokenizer=tokenizer)


def _up_to(longest: int, tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer.with_settings(max_tokens=max(longest, tokenizer.max_tokens))


def _class_of(config: Any) -> Any:
    import transformers

    return getattr(transformers, DUAL_ENCODER_FAMILIES[config.model_type].class_name)
