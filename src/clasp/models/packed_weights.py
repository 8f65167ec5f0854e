"""Weights of linear layers in bfloat16 and in the processor's own layout, for the forward passes of one call.

Input: a context around passes in inference mode under autocast on a CPU. Output: the products of layers, from weights
that are cast and laid out once. Note: autocast casts a frozen weight anew at every use, and oneDNN lays it out anew in
every product. A context keeps its own until its end and no longer, so that nothing outlives a change of the weights,
which must not change inside. A layer is packed when it is used again: for a single pass it would not pay. Where several
passes are announced it is packed at once, and so is a layer with a factor: the first batch has the bits of later ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.frozen_products import frozen_products, has_bfloat16_kernel


class _Packed(dict[tuple[object, ...], tuple[Tensor, Tensor] | None]):
    """Weight and bias by the layers that are multiplied together and the factor; None after their first use."""

    at_once = False


_PACKED_DTYPES = (torch.float32, torch.bfloat16)
_packed: ContextVar[_Packed | None] = ContextVar("packed", default=None)


@contextmanager
def packed_weights(*, at_once: bool = False) -> Iterator[None]:
    """Context that keeps packed weights until its end; nested, the outer one does. ``at_once``: from the first pass on,
    where there will be several."""
    token = None
    if _packed.get() is None:
        packed = _Packed()
        packed.at_once = at_once
        token = _packed.set(packed)
    try:
        yield
    finally:
        if token is not None:
            _packed.reset(token)


def packed_products(
    x: Float[Tensor, "*batch D"], layers: Sequence[nn.Module], factor: Float[Tensor, " _"] | None = None
) -> list[Tensor] | None:
    """The outputs of linear layers for one input, as under autocast; ``None`` where the layers are to be called.

    So outside of the context, at a first use, and for layers that are more than their product. ``factor``: of each
    output, multiplied into the weights before they are rounded.
    """
    packed, key = _packed.get(), (*layers, factor)
    if packed is None or not (torch.is_inference_mode_enabled() and _computes_in_bfloat16()):
        return None
    plain = [layer for layer in layers if _is_plain(layer)]
    used = factor is not None or key in packed or packed.at_once  # a factor rounds: alike in every batch
    if len(plain) < len(layers) or not used:
        packed[key] = None
        return None
    found = packed.get(key)
    if found is None:
        found = packed[key] = _pack(plain, x.numel() // x.shape[-1], factor)
    joined = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), *found, "none", [], "")
    return list(joined.split([layer.out_features for layer in plain], dim=-1))


def product(layer: nn.Module, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch _"]:
    """The output of a linear layer, from packed or from frozen weights where it has such."""
    found = packed_products(x, (layer,)) or frozen_products(x, (layer,))
    return layer(x) if found is None else found[0]


def scaled_product(
    layer: nn.Module, x: Float[Tensor, "*batch D"], scale: nn.Module, factor: Float[Tensor, " _"]
) -> Float[Tensor, "*batch _"]:
    """``scale(layer(x))``, where ``scale`` multiplies by ``factor``: one product with packed weights, unless something
    watches between them."""
    watched = any(each._forward_hooks or each._forward_pre_hooks or "forward" in vars(each) for each in (layer, scale))
    found = None if watched else packed_products(x, (layer,), factor)
    return scale(product(layer, x)) if found is None else found[0]


def _computes_in_bfloat16() -> bool:
    lower = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return lower and has_bfloat16_kernel()


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is its product in bfloat16 alone, on a CPU: no subclass, hook or replaced ``forward``,
    and no weights in float64, which autocast leaves alone."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    weight = layer.weight
    return "forward" not in vars(layer) and weight.device.type == "cpu" and weight.dtype in _PACKED_DTYPES


def _pack(layers: Sequence[nn.Linear], rows: int, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights of all layers below each other, laid out for inputs of so many rows, and their biases."""
    weights = [layer.weight for layer in layers]
    biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    if factor is not None:
        weights = [factor[:, None] * weight for weight in weights]
        biases = [factor * bias for bias in biases]
    weight, bias = (torch.cat([each.to(torch.bfloat16) for each in parts]) for parts in (weights, biases))
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias
