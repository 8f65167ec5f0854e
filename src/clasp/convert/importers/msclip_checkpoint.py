"""Reads MS-CLIP's state dict into our encoders: the 521 names of the released models and all sharing variants.

Input: a bare state dict. Output: an ``MSCLIPCheckpoint``: a pair of encoders, two heads, a log scale. Sizes are read
from shapes, and the sharing policy from which tensors are identical. Every key is mapped or the file is refused. Note:
the number of heads, the layers of the parallel branch and, with a stem alone, the image size leave no trace in the
weights and are arguments. Images are normalised with ImageNet's mean and deviation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from clasp.convert.importers.msclip_names import MSCLIP_IMAGE_PREFIX, MSCLIP_TEXT_PREFIX, msclip_name_map
from clasp.models.sharing.policy import SharingOverride, SharingSettings
from clasp.models.sharing.tie import TiedEncoders
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.models.transformer.settings import ImageTransformerSettings, TextTransformerSettings
from clasp.types import UserError

_ATTENTION_HEAD_WIDTH = 64
MSCLIP_LATERAL_LAYERS = (2, 4, 6, 8, 10)
_TensorPair = tuple[Tensor | None, Tensor | None]  # (image, text)
# parts of a block that may be shared: our policy's name to MS-CLIP's parameter names
_PART_TENSORS = {
    "attention": ("attn.in_proj_weight", "attn.in_proj_bias"),
    "o": ("attn.out_proj.weight", "attn.out_proj.bias"),
    "ffn": ("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    "norm1": ("ln_1.weight", "ln_1.bias"),
    "norm2": ("ln_2.weight", "ln_2.bias"),
}


@dataclass(frozen=True, slots=True)
class MSCLIPCheckpoint:
    """A released model as native encoders; the heads are weights of ``nn.Linear`` without bias."""

    encoders: TiedEncoders
    image_head: Float[Tensor, "E D"]
    text_head: Float[Tensor, "E F"]
    log_scale: Float[Tensor, ""]


def parse_msclip_state_dict(
    tensors: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    lateral_layers: Sequence[int] = MSCLIP_LATERAL_LAYERS,
    size: int = 224,
) -> MSCLIPCheckpoint:
    """The model of a state dict, in float32 and eval mode.

    ``heads`` is that of both encoders, by default one per 64 channels. ``size`` is used only for a model with a stem
    and no parallel branch. Raises ``UserError`` for unexpected or missing keys, for shapes that do not match, and for a
    part of a layer that is only partly shared.
    """
    image, text = _image_settings(tensors, heads, lateral_layers, size), _text_settings(tensors, heads)
    pair = TiedEncoders(ImageTransformer(image), TextTransformer(text), _infer_sharing(tensors, image, text), seed=0)
    names, ours = msclip_name_map(image, text), _named_tensors(pair)
    for problem, keys in (("lacks", names.keys() - tensors.keys()), ("also has", tensors.keys() - names.keys())):
        if keys:
            raise UserError(f"not an MS-CLIP state dict: it {problem} {_first_of(keys)}")
    joint = tensors["visual.proj"].shape[-1]
    heads_and_scale = {"image_head": (image.width, joint), "text_head": (text.width, joint), "log_scale": ()}
    for theirs, name in names.items():
        wanted = _squeeze_batch(ours[name]).shape if name in ours else heads_and_scale[name]
        _check_shape(theirs, tensors[theirs], wanted)
        if not tensors[theirs].is_meta and not tensors[theirs].isfinite().all():
            raise UserError(f"the state dict is damaged: {theirs} has numbers that are not finite")
        if theirs.endswith("running_var") and not tensors[theirs].is_meta and (tensors[theirs] < 0).any():
            raise UserError(f"the state dict is damaged: {theirs} has variances below zero")
        if name in ours:
            _squeeze_batch(ours[name]).copy_(tensors[theirs])
    image_head, text_head = (tensors[key].float().T.contiguous() for key in ("visual.proj", "text_projection"))
    return MSCLIPCheckpoint(pair.eval(), image_head, text_head, tensors["logit_scale"].float().clone())


# --- sizes -----------------------------------------------------------------------------------------------------------


def _image_settings(
    tensors: Mapping[str, Tensor], heads: int | None, lateral_layers: Sequence[int], size: int
) -> ImageTransformerSettings:
    rows, width = _shape(tensors, "visual.positional_embedding", 2)
    grid = math.isqrt(rows - 1)
    if grid * grid != rows - 1:
        raise UserError(
            f"not an MS-CLIP state dict: visual.positional_embedding has {rows} rows, not a square number plus one"
        )
    stem = f"{MSCLIP_IMAGE_PREFIX}resblocks.0.conv1.weight" in tensors
    laterals = _count(tensors, f"{MSCLIP_IMAGE_PREFIX}parallel_lateral_adapter.")
    if laterals not in (0, len(lateral_layers)):
        raise UserError(
            f"the branch joins before {laterals} layers, and {len(lateral_layers)} are given; set "
            "lateral=, such as 2,4,6,8,10"
        )
    layers = _count(tensors, f"{MSCLIP_IMAGE_PREFIX}resblocks.")
    if laterals and not stem <= lateral_layers[0] <= lateral_layers[-1] < layers:
        raise UserError(
            f"the branch cannot join before layers {', '.join(map(str, lateral_layers))} of {layers}; set lateral= to "
            f"{laterals} layers of {int(stem)} to {layers - 1}"
        )
    if not stem:
        patch = _shape(tensors, "visual.conv1.weight", 4)[-1]
    elif laterals:  # the first stage of the branch halves the image
        patch = (
            2
            * _shape(tensors, f"{MSCLIP_IMAGE_PREFIX}parallel_lateral_adapter.0.top2bottom_dw_conv.conv.weight", 4)[-1]
        )
    else:
        patch = size // grid
    return _validated(
        ImageTransformerSettings,
        **_block_settings(tensors, MSCLIP_IMAGE_PREFIX, width, heads),
        size=patch * grid,
        patch=patch,
        stem="batch" if stem else None,
        branch={"kind": "paper", "before": tuple(lateral_layers)} if laterals else None,
        patch_bias=False,
        entry_norm=True,
    )


def _text_settings(tensors: Mapping[str, Tensor], heads: int | None) -> TextTransformerSettings:
    vocabulary, width = _shape(tensors, "token_embedding.weight", 2)
    context, _ = _shape(tensors, "positional_embedding", 2)
    return _validated(
        TextTransformerSettings,
        **_block_settings(tensors, MSCLIP_TEXT_PREFIX, width, heads),
        vocabulary=vocabulary,
        context=context,
        attention="causal",
        token_std=1.0,
    )


def _block_settings(tensors: Mapping[str, Tensor], net: str, width: int, heads: int | None) -> dict[str, Any]:
    layers = _count(tensors, f"{net}resblocks.")
    if heads is not None and width % heads:
        raise UserError(f"image_heads={heads} does not divide the width of {width}")
    hidden, _ = _shape(tensors, f"{net}resblocks.{layers - 1}.mlp.c_fc.weight", 2)
    if heads is None and width % _ATTENTION_HEAD_WIDTH:
        raise UserError(
            f"the state dict is {width} wide, which is not a multiple of {_ATTENTION_HEAD_WIDTH}; "
            "set image_heads= to the number of its heads"
        )
    return {
        "width": width,
        "heads": heads or width // _ATTENTION_HEAD_WIDTH,
        "hidden": None if hidden == 4 * width else hidden,
        "layers": layers,
        "activation": "quick-gelu",
        "norm": "layer",
        "eps": 1e-12,
    }


def _validated(kind: type, **settings: Any) -> Any:
    try:
        return kind(**settings)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"the state dict is not of a valid MS-CLIP: {reason}") from None


def _shape(tensors: Mapping[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    if key not in tensors:
        raise UserError(f"not an MS-CLIP state dict: it lacks {key!r}")
    shape = tuple(tensors[key].shape)
    if len(shape) != axes:
        raise UserError(f"not an MS-CLIP state dict: {key} has shape {shape}")
    return shape


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers below ``prefix``: one more than the largest number."""
    numbered = (re.match(rf"{re.escape(prefix)}(\d+)\.", key) for key in tensors)
    return 1 + max((int(found[1]) for found in numbered if found), default=-1)


# --- sharing ---------------------------------------------------------------------------------------------------------


def _infer_sharing(
    tensors: Mapping[str, Tensor], image: ImageTransformerSettings, text: TextTransformerSettings
) -> SharingSettings:
    """The policy, from the tensors that both encoders share: by storage, or by value where no storage is shared."""
    layers = range(image.first_layer, min(image.layers, text.layers))
    shareable = [name for names in _PART_TENSORS.values() for name in names]
    keys = [
        f"{net}resblocks.{layer}.{name}"
        for layer in layers
        for name in shareable
        for net in (MSCLIP_IMAGE_PREFIX, MSCLIP_TEXT_PREFIX)
    ]
    if missing := [key for key in keys if key not in tensors]:
        raise UserError(f"not an MS-CLIP state dict: it lacks {_first_of(missing)}")
    pairs_of = {
        (layer, part): _tensor_pairs(tensors, layer, names) for layer in layers for part, names in _PART_TENSORS.items()
    }
    aliased = any(_same_storage(*both) for pairs in pairs_of.values() for both in pairs)
    shared = [
        (layer, [part for part in _PART_TENSORS if _is_shared(layer, part, pairs_of[layer, part], aliased)])
        for layer in layers
    ]
    ranges = []
    for parts, group in groupby(shared, key=lambda item: item[1]):
        numbers = [layer for layer, _ in group]
        if parts:
            choices = {part: "shared" if part in parts else "separate" for part in _PART_TENSORS}
            ranges.append({"layers": f"{numbers[0]}:{numbers[-1] + 1}", **choices})
    if not ranges:
        return SharingSettings()
    return SharingSettings(**ranges[0], overrides=tuple(SharingOverride(**section) for section in ranges[1:]))


def _tensor_pairs(tensors: Mapping[str, Tensor], layer: int, names: Sequence[str]) -> list[_TensorPair]:
    keys = [f"resblocks.{layer}.{name}" for name in names]
    return [(tensors.get(MSCLIP_IMAGE_PREFIX + key), tensors.get(MSCLIP_TEXT_PREFIX + key)) for key in keys]


def _is_shared(layer: int, part: str, pairs: list[_TensorPair], aliased: bool) -> bool:
    same = [_same_storage(*both) if aliased else _equal(*both) for both in pairs]
    # separate matrices may have equal vectors beside them, such as biases that are all zero
    if not aliased:
        _refuse_near_equal(
            layer, [name for name, one in zip(_PART_TENSORS[part], same, strict=True) if not one], pairs, part
        )
    matrices = [one for one, (tensor, _) in zip(same, pairs, strict=True) if tensor is not None and tensor.ndim > 1]
    if all(same):
        return True
    if any(same) if aliased else any(matrices):
        which = _PART_TENSORS[part][same.index(False)]
        raise UserError(
            f"layer {layer} of the state dict shares {part} only partly: {which} differs between the two nets"
        )
    return False


def _refuse_near_equal(layer: int, names: list[str], pairs: list[_TensorPair], part: str) -> None:
    """Raises ``UserError`` for matrices whose relative difference is below 1 %: a shared one of which a copy is
    damaged.

    Separately trained matrices differ by about their norm."""
    for name, (one, other) in zip(_PART_TENSORS[part], pairs, strict=True):
        if name not in names or one is None or other is None or one.ndim < 2 or one.shape != other.shape:
            continue
        if (one - other).norm() < 0.01 * one.norm():
            raise UserError(
                f"layer {layer} of the state dict: {name} is nearly, but not quite, the same in both nets; the file "
                "shares nothing by storage, and one of its copies is damaged"
            )


def _same_storage(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _named_tensors(pair: TiedEncoders) -> dict[str, Tensor]:
    """Parameters under each of their names, aliases included, and buffers."""
    parameters = {name: p.detach() for name, p in pair.named_parameters(remove_duplicate=False)}
    return {**parameters, **dict(pair.named_buffers())}


def _squeeze_batch(tensor: Tensor) -> Tensor:
    """MS-CLIP's layout has no batch axis in the class token ``[1 1 D]`` and positions ``[1 N D]``."""
    return tensor.squeeze((0, 1)) if tensor.ndim == 3 else tensor


def _check_shape(key: str, tensor: Tensor, wanted: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        raise UserError(f"not an MS-CLIP state dict: {key} is {tuple(tensor.shape)}, not {tuple(wanted)}")


def _first_of(keys: Iterable[str]) -> str:
    first, *more = sorted(keys)
    return f"{first!r} and {len(more)} more" if more else repr(first)
