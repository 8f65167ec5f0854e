"""Image towers from timm, with its hub weights or with weights from a file.

Input: a model name of timm. Output: a ``Backbone`` whose hidden states are those of ``forward_features``. Note: the net
is created with the classifier of its checkpoint, since timm checks parameter names only then, and the classifier is
dropped afterwards; parameters that the hidden states do not depend on are found on the meta device, whatever their name
in the family, and dropped. Importing this module needs timm.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_model_data_config
from timm.layers.norm import LayerNorm2d
from timm.models import load_state_dict
from torch import Tensor, nn

from clasp.data.images import ImageTransform
from clasp.models.backbone import Backbone
from clasp.models.classifier import Classifier
from clasp.models.classifier_pooling import find_classifier_pooling
from clasp.models.family_layouts import FAMILY_LAYOUTS
from clasp.models.partial_forward import as_tokens
from clasp.models.probe import image_probe
from clasp.models.tower_settings import ImageTowerSettings
from clasp.models.zoo.huggingface import translate_hub_errors
from clasp.models.zoo.timm_labels import NamedOutputs, timm_concepts
from clasp.types import Pixels, UserError


def load_timm_backbone(name: str, settings: ImageTowerSettings, meta: bool) -> Backbone:
    """The tower ``NAME`` or ``NAME@FILE``; see ``clasp.models.zoo.registry.load_backbone``."""
    name, _, file = name.partition("@")
    family = name.partition(".")[0]
    if not timm.is_model(family):
        near = difflib.get_close_matches(family, timm.list_models(), n=3)
        raise UserError(f"tower = {settings.tower!r}: timm has no model {name!r}; nearest: {', '.join(near) or 'none'}")
    if file and not Path(file).is_file():
        raise UserError(f"tower = {settings.tower!r}: there is no file {file}")
    with translate_hub_errors(settings.tower):
        own = _checkpoint_options(name, file) if file and not meta else {}
        cfg = timm.get_pretrained_cfg(name)
        if settings.size and cfg is not None and cfg.fixed_input_size:
            own["img_size"] = settings.size
        with torch.device("meta" if meta else "cpu"):
            net: Any = timm.create_model(name, pretrained=not meta, **own).eval()
            named = None if meta else timm_concepts(net.pretrained_cfg, net.num_classes)
            net.reset_classifier(0)
    facts = resolve_model_data_config(net)
    transform = _read_transform(facts, settings)
    _drop_unused_parameters(net, transform.size)
    pool = "cls" if vars(net).get("global_pool") == "token" else "mean"

    def classifier() -> Classifier | None:
        assert named is not None
        with translate_hub_errors(settings.tower):
            whole = timm.create_model(name, pretrained=True, **own).eval()
        return _read_classifier(whole, named, transform.size)

    return Backbone(
        settings.tower,
        "image",
        net,
        f"timm {timm.__version__}",
        pool,
        transform,
        forward_features=_states,
        classifier=classifier if named is not None else None,
    )


def _read_classifier(net: Any, named: NamedOutputs, size: int) -> Classifier | None:
    """The classifier of a whole net, which is changed; ``None`` where it reads anything but pooled hidden states."""
    layer = net.get_classifier()
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None  # a distilled net has two
    weight = layer.weight.detach().flatten(1)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    pixels = image_probe(size, torch.device("cpu")).beside
    assert isinstance(pixels, Pixels)
    with torch.no_grad():
        logits = net(pixels.values)
    net.reset_classifier(0)
    _drop_unused_parameters(net, size)
    with torch.no_grad():
        states = as_tokens(_states(net, pixels.values))
    pool = find_classifier_pooling(net, states, (weight, bias), logits)
    return None if pool is None else Classifier(weight, bias, named.concepts, pool, named.source)


def _checkpoint_options(name: str, file: str) -> dict[str, Any]:
    """Options with which timm loads ``file`` strictly: the number of classes of its classifier."""
    cfg = timm.get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg is not None else None
    first = classifier if isinstance(classifier, str) or classifier is None else classifier[0]
    weight = load_state_dict(file, device="cpu").get(f"{first}.weight")
    classes = 0 if weight is None else len(weight)
    overlay = {"file": file, "num_classes": classes, "label_offset": 0, "custom_load": False}
    return {"num_classes": classes, "pretrained_cfg_overlay": overlay}


def _read_transform(facts: dict[str, Any], settings: ImageTowerSettings) -> ImageTransform:
    squash = facts["crop_mode"] == "squash"
    return ImageTransform(
        settings.size or facts["input_size"][-1],
        tuple(facts["mean"]),
        tuple(facts["std"]),
        resize="squash" if squash else "crop",
        interpolation=facts["interpolation"],
        crop_fraction=1.0 if squash else facts["crop_pct"],
    )


def _states(net: Any, pixels: Float[Tensor, "B 3 height width"]) -> Tensor:
    states = net.forward_features(pixels)
    if states.ndim == 4 and states.shape[-1] == net.num_features != states.shape[1]:
        return states.flatten(1, 2)  # channels-last maps of hierarchical transformers
    return states


class _Features(nn.Module):
    """``forward_features`` as a ``forward``, for ``torch.func.functional_call``."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        return _states(self.net, pixels)


def _drop_unused_parameters(net: nn.Module, size: int) -> None:
    """Drop every parameter that the hidden states do not depend on: attention pooling, a last convolution, masks.

    A norm of the pooled vector is retained where the family's layout has one.
    """
    features = _Features(net)
    shadows = {name: p.detach().to("meta").requires_grad_() for name, p in features.named_parameters()}
    buffers = {name: b.to("meta") for name, b in features.named_buffers()}
    pixels = torch.empty(1, 3, size, size, device="meta")
    torch.func.functional_call(features, {**shadows, **buffers}, (pixels,)).sum().backward()
    layout = FAMILY_LAYOUTS.get(type(net).__name__)
    norm = layout.pooled_norm if layout is not None else None
    for name in (name.removeprefix("net.") for name, shadow in shadows.items() if shadow.grad is None):
        owner, _, leaf = name.rpartition(".")
        if owner != norm:
            setattr(net.get_submodule(owner), leaf, None)
    if norm in dict(net.named_modules()):
        _norm_over_vectors(net, norm)


def _norm_over_vectors(net: nn.Module, path: str) -> None:
    """Replace a norm of feature maps after pooling by the same norm of vectors, with the same parameter objects."""
    map_norm: Any = net.get_submodule(path)
    if isinstance(map_norm, LayerNorm2d):
        norm = nn.LayerNorm(list(map_norm.normalized_shape), map_norm.eps, device="meta")
        norm.weight, norm.bias = map_norm.weight, map_norm.bias
        net.set_submodule(path, norm)
