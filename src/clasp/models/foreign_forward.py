"""The forward pass of a foreign net: pixels or token ids to hidden states.

Input: a net of any library, and the ``forward_features`` of its ``Backbone``. Output: hidden states ``[B N D]``,
feature maps ``[B D h w]`` or vectors ``[B D]``. Note: nets of ``transformers``, and those with its argument names, are
called by keyword, all others with pixels, or with ids and mask, in that order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from clasp.data.images import ImageTransform
from clasp.models.structure import ModelStructure, is_norm, is_transformers_model
from clasp.models.transformer.bert import BertEncoder
from clasp.models.transformer.dinov2 import Dinov2Encoder
from clasp.models.transformer.encoders import ImageTransformer
from clasp.types import Pixels, Tokens, UserError


def foreign_states(
    name: str, net: nn.Module, inputs: Pixels | Tokens, forward_features: Callable[[nn.Module, Any], Tensor] | None
) -> Tensor:
    """The hidden states ``[B N D]``, feature maps ``[B D h w]`` or vectors ``[B D]`` of ``inputs``.

    Raises ``UserError`` for a net that returns anything else.
    """
    given = inputs.values if isinstance(inputs, Pixels) else inputs
    if forward_features is not None:
        output: Any = forward_features(net, given)
    elif isinstance(inputs, Tokens):
        output = _forward_tokens(net, inputs)
    else:
        output = _forward_pixels(net, inputs.values)
    if not isinstance(output, Tensor):
        output = _states_of(name, output)
    if not 2 <= output.ndim <= 4 or (isinstance(inputs, Tokens) and output.ndim != 3):
        wanted = "[B N D], maps [B D h w] or vectors [B D]" if isinstance(inputs, Pixels) else "[B N D]"
        raise UserError(
            f"tower = {name!r}: its net returns a tensor of shape {list(output.shape)}, not states {wanted}; give its "
            "clasp.Backbone a forward_features that does"
        )
    return output


def _states_of(name: str, output: Any) -> Tensor:
    try:
        return output.last_hidden_state
    except AttributeError:
        has = f" of {', '.join(map(str, output))}"[:80] if isinstance(output, dict) else ""
        raise UserError(
            f"tower = {name!r}: its net returns a {type(output).__name__}{has}, not states; give its clasp.Backbone a "
            "forward_features, a function of net and inputs that returns states [B N D] or, for images, maps [B D h w]"
        ) from None


def native_image_size(net: nn.Module, transform: ImageTransform | None) -> int:
    """An input size in pixels that the net accepts: that of its transform, else of its configuration, else 64."""
    if isinstance(net, ImageTransformer):
        return net.size
    if transform is not None:
        return transform.size
    if isinstance(net, Dinov2Encoder):
        return net.settings.image_size
    size = (net.config.to_dict().get("image_size") if is_transformers_model(net) else None) or 64
    return size if isinstance(size, int) else size[0]


def declared_width(net: nn.Module, structure: ModelStructure, modality: str) -> int | None:
    """Width of the hidden states according to the final norm or a ``transformers`` configuration."""
    if structure.tail and is_norm(last := net.get_submodule(structure.tail[-1])):
        return next(last.parameters()).numel()
    if isinstance(net, BertEncoder):
        return net.settings.hidden_size
    return net.config.hidden_size if modality == "text" and is_transformers_model(net) else None


def drop_module(net: nn.Module, path: str) -> None:
    """Drop an unused part: a module is replaced by ``nn.Identity``, a parameter by ``None``, which models check for."""
    owner_path, _, name = path.rpartition(".")
    owner = net.get_submodule(owner_path)
    if name in dict(owner.named_children()):
        setattr(owner, name, nn.Identity())
    elif name in dict(owner.named_parameters(recurse=False)):
        setattr(owner, name, None)


def disable_kv_cache(net: nn.Module) -> None:
    """Switch the key-value cache of a decoder off: no token is generated."""
    if is_transformers_model(net) and "use_cache" in net.config.to_dict():
        net.config.use_cache = False


# --- how -------------------------------------------------------------------------------------------------------------


def _forward_tokens(net: nn.Module, tokens: Tokens) -> Any:
    mask = tokens.mask.long()
    if _takes(net, "input_ids"):
        return net(input_ids=tokens.ids, attention_mask=mask)
    return net(tokens.ids, mask)


def _forward_pixels(net: nn.Module, pixels: Tensor) -> Any:
    kind = type(net).__name__
    if kind in _FORWARD_BY_CLASS:
        return _FORWARD_BY_CLASS[kind](net, pixels)
    resizes = {"interpolate_pos_encoding": True} if kind in _INTERPOLATES_ON_REQUEST else {}
    return net(pixel_values=pixels, **resizes) if _takes(net, "pixel_values") else net(pixels)


def _takes(net: nn.Module, argument: str) -> bool:
    return is_transformers_model(net) or argument in inspect.signature(net.forward).parameters


def _forward_unmasked(net: Any, pixels: Tensor) -> Any:
    """ViT-MAE masks patches at random, in evaluation too; mask ratio 0 and increasing noise keep all in their order."""
    net.config.mask_ratio = 0.0
    _, _, height, width = pixels.shape
    patches = (height // net.config.patch_size) * (width // net.config.patch_size)
    order = pixels.new_ones(patches).cumsum(0).expand(pixels.shape[0], -1)
    return net(pixel_values=pixels, noise=order, interpolate_pos_encoding=True)


_FORWARD_BY_CLASS: dict[str, Callable[[Any, Tensor], Any]] = {
    "EfficientNet": lambda net, pixels: net.extract_features(pixels),
    "ViTMAEModel": _forward_unmasked,
}
_INTERPOLATES_ON_REQUEST = (
    *("ViTModel", "DeiTModel", "CLIPVisionModel", "ChineseCLIPVisionModel", "MetaClip2VisionModel"),
    *("SiglipVisionModel", "MLCDVisionModel"),
)
