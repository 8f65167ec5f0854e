"""The products of frozen linear layers in a training step in bfloat16.

Input: layers whose weights the step holds in bfloat16 (``models.frozen_casts``), and an input of all of them. Output:
their outputs, as under autocast, to rounding. Note: PyTorch's product first fills its output with the bias, and
autograd adds up the gradients of the input, one of each layer, in passes of their own; here products add both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def frozen_products(x: Float[Tensor, "*batch D"], layers: Sequence[nn.Module]) -> list[Tensor] | None:
    """The outputs of frozen layers for one input; ``None`` where the layers are to be called."""
    if (frozen := _frozen_in_bfloat16(x, layers)) is None:
        return None
    with torch.autocast("cpu", enabled=False):
        return list(_FrozenProducts.apply(x, frozen))  # pyright: ignore[reportArgumentType]


def frozen_feed_forward(x: Float[Tensor, "*batch D"], *layers: nn.Module) -> Float[Tensor, "*batch D"] | None:
    """``fc2(gelu(fc1(x)))`` of two frozen layers; ``None`` where they are to be called."""
    if (frozen := _frozen_in_bfloat16(x, layers)) is None:
        return None
    with torch.autocast("cpu", enabled=False):
        return _FrozenFeedForward.apply(x, *frozen)  # pyright: ignore[reportReturnType]


def biased_product(rows: Float[Tensor, "n D"], weight: Tensor, bias: Tensor | None) -> Float[Tensor, "n _"]:
    """``rows W + b``, with the bias added in the product where oneDNN computes it: in bfloat16 on a CPU."""
    lower = rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and has_bfloat16_kernel()
    if lower and bias is not None and len(rows):
        return torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


@cache
def has_bfloat16_kernel() -> bool:
    """Whether this build of PyTorch has oneDNN, and oneDNN the instructions for bfloat16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _frozen_in_bfloat16(x: Tensor, layers: Sequence[nn.Module]) -> list[nn.Linear] | None:
    """The layers, where a step on a CPU holds all of them so; else ``None``."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or x.dtype == torch.float64:
        return None
    frozen = [layer for layer in layers if _is_frozen_in_bfloat16(layer)]
    return frozen if len(frozen) == len(layers) else None


def _is_frozen_in_bfloat16(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is its product alone, no subclass, hook or replaced ``forward``, and its weights are cast."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    parameters = list(layer.parameters(recurse=False))
    return all(p.dtype == torch.bfloat16 and not p.requires_grad for p in parameters)


class _FrozenProducts(torch.autograd.Function):
    """``x W + b`` of several layers, and the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
        ctx.layers, ctx.given = layers, (x.shape, x.dtype)
        rows = x.to(torch.bfloat16).flatten(0, -2)
        outputs = (biased_product(rows, layer.weight, layer.bias) for layer in layers)
        return tuple(out.view(*x.shape[:-1], -1) for out in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_x = None
        for layer, gradient in zip(ctx.layers, gradients, strict=True):
            rows = gradient.flatten(0, -2)
            of_x = rows @ layer.weight if of_x is None else of_x.addmm_(rows, layer.weight)
        assert of_x is not None
        shape, dtype = ctx.given
        return of_x.view(shape).to(dtype), None


class _FrozenFeedForward(torch.autograd.Function):
    """``fc2(gelu(fc1(x)))``; keeps the input of GELU, whose gradient overwrites that of its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
        ctx.layers, ctx.given = (fc1, fc2), (x.shape, x.dtype)
        inside = biased_product(x.to(torch.bfloat16).flatten(0, -2), fc1.weight, fc1.bias)
        ctx.save_for_backward(inside)
        return biased_product(F.gelu(inside), fc2.weight, fc2.bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,), (fc1, fc2), (shape, dtype) = ctx.saved_tensors, ctx.layers, ctx.given
        gradient = gradients[0].flatten(0, -2) @ fc2.weight
        torch.ops.aten.gelu_backward.grad_input(gradient, inside, grad_input=gradient)
        return (gradient @ fc1.weight).view(shape).to(dtype), None, None
