"""Weights of linear layers in bfloat16 and in the processor's own layout, for the forward passes of one call.

Input: a context around passes in inference mode under autocast on a CPU. Output: the products of layers, from weights
that are cast and laid out once. Note: autocast casts a frozen weight anew at every use, and oneDNN lays it out anew in
every product. A context keeps its own until its end and no longer, so that nothing outlives a change of the weights,
which must not change inside. A layer is packed when it is used again: for a single pass it would not pay. Where several
passes are announced it is packed at once, and so is a layer with a factor: the first batch has the bits of later ones.
A low-rank update is added to packed weights, which rounds otherwise: a first batch that is alone, or that was not
announced, differs from later ones in last bits (a query of one text would take a fifth longer).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.frozen_products import frozen_products, has_bfloat16_kernel


class Product(NamedTuple):
    """The weights of ``x W + b``, for layers that compute nothing else."""

    weight: Float[Tensor, "out D"]
    bias: Float[Tensor, " out"] | None


class FoldableForward(ABC):
    """A replacement for the ``forward`` of a layer whose update can be added to its weight: the output is the same to
    rounding."""

    @abstractmethod
    def is_foldable(self) -> bool:
        """Whether the layer computes nothing else in inference, as it is now."""

    @abstractmethod
    def fold(self) -> Product:
        """The layer as one product, in float32."""


class _PackedProduct(NamedTuple):
    """Weight and bias of layers below each other, and the number of outputs of each."""

    weight: Tensor
    bias: Tensor
    widths: list[int]


class _Packed(dict[tuple[object, ...], _PackedProduct | None]):
    """By the layers that are multiplied together and the factor; None after their first use."""

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


def announce_passes() -> None:
    """Have layers packed from now on at their first use, inside of the context: several passes will follow."""
    if (packed := _packed.get()) is not None:
        packed.at_once = True


def packed_products(
    x: Float[Tensor, "*batch D"], layers: Sequence[nn.Module], factor: Float[Tensor, " _"] | None = None
) -> list[Tensor] | None:
    """The outputs of linear layers for one input, as under autocast; ``None`` where the layers are to be called.

    So outside of the context, at a first use, and for layers that are more than one product. ``factor``: of each
    output, multiplied into the weights before they are rounded.
    """
    packed, key = _packed.get(), (*layers, factor)
    if packed is None or not (torch.is_inference_mode_enabled() and _computes_in_bfloat16()):
        return None
    scaled = factor is not None and not any("forward" in vars(layer) for layer in layers)  # alike in every batch
    if not (scaled or key in packed or packed.at_once) or not all(map(_is_one_product, layers)):
        packed[key] = None
        return None
    found = packed.get(key)
    if found is None:
        found = packed[key] = _pack(layers, x.numel() // x.shape[-1], factor)
    joined = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), found.weight, found.bias, "none", [], "")
    return list(joined.split(found.widths, dim=-1))


def product(layer: nn.Module, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch _"]:
    """The output of a linear layer, from packed or from frozen weights where it has such."""
    found = packed_products(x, (layer,)) or frozen_products(x, (layer,))
    return layer(x) if found is None else found[0]


def scaled_product(
    layer: nn.Module, x: Float[Tensor, "*batch D"], scale: nn.Module, factor: Float[Tensor, " _"]
) -> Float[Tensor, "*batch _"]:
    """``scale(layer(x))``, where ``scale`` multiplies by ``factor``: one product with packed weights, unless something
    watches between them."""
    found = None if _is_watched(scale) or "forward" in vars(scale) else packed_products(x, (layer,), factor)
    return scale(product(layer, x)) if found is None else found[0]


def _computes_in_bfloat16() -> bool:
    lower = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return lower and has_bfloat16_kernel()


def _is_one_product(layer: nn.Module) -> bool:
    """Whether calling the layer is one product in bfloat16, on a CPU: no subclass, hook or replaced ``forward``, unless
    that can be folded, and no weights in float64, which autocast leaves alone."""
    replaced = vars(layer).get("forward")
    if isinstance(replaced, FoldableForward):
        return not _is_watched(layer) and replaced.is_foldable()
    return replaced is None and is_plain_linear(layer)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether an ``nn.Linear`` is on a CPU, in a dtype that is packed, and nothing wraps or watches it."""
    if type(layer) is not nn.Linear or _is_watched(layer) or "forward" in vars(layer):
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype in _PACKED_DTYPES


def _is_watched(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _product_of(layer: Any) -> Product:
    replaced = vars(layer).get("forward")
    return Product(layer.weight, layer.bias) if replaced is None else replaced.fold()


def _pack(layers: Sequence[nn.Module], rows: int, factor: Tensor | None) -> _PackedProduct:
    """The weights of all layers below each other, laid out for inputs of so many rows, and their biases."""
    products = [_product_of(layer) for layer in layers]
    weights = [product.weight for product in products]
    widths = [len(weight) for weight in weights]
    biases = [torch.zeros(len(each.weight)) if each.bias is None else each.bias for each in products]
    if factor is not None:
        weights = [factor[:, None] * weight for weight in weights]
        biases = [factor * bias for bias in biases]
    weight, bias = (torch.cat([each.to(torch.bfloat16) for each in parts]) for parts in (weights, biases))
    return _PackedProduct(torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias, widths)
