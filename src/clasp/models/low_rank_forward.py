"""The forward pass of LoRA layers in bfloat16: layers with one input share their products of it.

Input: layers that peft has wrapped. Output: a replacement for the ``forward`` of each, and ``project_together`` for
those of one input (queries, keys and values). Note: peft scales the update and adds it in passes of their own over the
output, forward and backward, and autograd adds up the gradients of the input, two of each layer; here each update and
each of those gradients is added in its product, and the down-projections of all layers are one. Outputs and gradients
are peft's within bfloat16's rounding; in float32, peft's own is called. Without gradients the products are the same:
gradient caching embeds once in each way. A call that encodes adds the updates to its packed weights
(``models.packed_weights``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clasp.models.autocast import is_autocast
from clasp.models.frozen_casts import is_plain_low_rank
from clasp.models.frozen_products import biased_product, frozen_products
from clasp.models.packed_weights import FoldableForward, Product, is_plain_linear, packed_products


class LowRankForward(FoldableForward):
    """``x W + b + (s x A) B`` as two products in addition to that of the base layer (Hu et al., ICLR 2022, equation 3).

    An object rather than a closure, so that a deep copy of a tower runs the copied layers.
    """

    def __init__(self, wrapper: Any, adapter: str):
        self.wrapper, self.adapter = wrapper, adapter

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        layer, name = self.wrapper, self.adapter
        if args or options or not self.adds_in_product(x):
            return type(layer).forward(layer, x, *args, **options)
        if self.base_is_frozen:
            return _project([self], x)[0]
        base = layer.base_layer(x)
        inside = layer.lora_A[name](layer.lora_dropout[name](x)) * layer.scaling[name]
        up = layer.lora_B[name].weight
        return torch.addmm(base.flatten(0, -2), inside.flatten(0, -2), up.t()).view_as(base)

    def adds_in_product(self, x: Tensor) -> bool:
        """Whether the update of this input is added in a product: under autocast."""
        layer = self.wrapper
        return is_autocast(x.device) and not (layer.disable_adapters or layer.merged)

    def is_foldable(self) -> bool:
        layer, name = self.wrapper, self.adapter
        parts = (layer.base_layer, layer.lora_A[name], layer.lora_B[name])
        dropout = layer.lora_dropout[name]
        passes = isinstance(dropout, nn.Identity) or not dropout.training
        return passes and not (layer.disable_adapters or layer.merged) and all(map(is_plain_linear, parts))

    def fold(self) -> Product:
        """The update added to the weight before it is rounded (Hu et al., section 4.1)."""
        layer, name = self.wrapper, self.adapter
        base = layer.base_layer
        down, up = (part[name].weight.float() for part in (layer.lora_A, layer.lora_B))
        with torch.autocast("cpu", enabled=False):
            return Product(torch.addmm(base.weight.float(), up, down, alpha=layer.scaling[name]), base.bias)

    @property
    def base_is_frozen(self) -> bool:
        """Whether A and B alone get a gradient, and read the input of the base layer, without dropout or hooks."""
        layer, name = self.wrapper, self.adapter
        parts = (layer.base_layer, layer.lora_A[name], layer.lora_B[name])
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        frozen = not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
        return frozen and not hooked and isinstance(layer.lora_dropout[name], nn.Identity)


def project_together(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """The outputs of several layers for one input; layers that are all LoRA's share their products of it."""
    ready = packed_products(x, layers) or frozen_products(x, layers)
    if ready is not None:
        return ready
    forwards = [vars(layer).get("forward") for layer in layers]
    found = [each for each in forwards if isinstance(each, LowRankForward)]
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    if hooked or len(found) < len(layers) or not all(each.adds_in_product(x) and each.base_is_frozen for each in found):
        return [layer(x) for layer in layers]
    return _project(found, x)


def join_low_rank_update(wrapper: nn.Module, adapter: str) -> None:
    """Replace the ``forward`` of a plain LoRA layer over an ``nn.Linear``; other layers are left as they are."""
    layer: Any = wrapper
    if not (is_plain_low_rank(wrapper) and isinstance(layer.base_layer, nn.Linear)):
        return
    if not layer.lora_variant and layer.lora_B[adapter].bias is None:
        vars(wrapper)["forward"] = LowRankForward(wrapper, adapter)


class _FrozenBase(NamedTuple):
    """A frozen linear layer, and the factor of the update to its output."""

    weight: Tensor
    bias: Tensor | None
    scaling: float


def _project(forwards: Sequence[LowRankForward], x: Tensor) -> list[Tensor]:
    """The outputs of LoRA layers with frozen bases, in the dtype of autocast."""
    layers = [(each.wrapper, each.adapter) for each in forwards]
    bases = [_FrozenBase(layer.base_layer.weight, layer.base_layer.bias, layer.scaling[name]) for layer, name in layers]
    downs = [layer.lora_A[name].weight for layer, name in layers]
    ups = [layer.lora_B[name].weight for layer, name in layers]
    kind = x.device.type
    x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return list(_LowRankProducts.apply(x, bases, *downs, *ups))  # pyright: ignore[reportArgumentType]


class _LowRankProducts(torch.autograd.Function):
    """``x W + b + (s x A) B`` of several layers, and the gradients of x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bases: Sequence[_FrozenBase], *factors: Tensor) -> tuple[Tensor, ...]:
        downs, ups = factors[: len(bases)], [up.to(x.dtype) for up in factors[len(bases) :]]
        rows, down = x.flatten(0, -2), torch.cat([each.to(x.dtype) for each in downs])
        inside = rows @ down.t()
        outputs = []
        for base, up, part in zip(bases, ups, inside.split([len(each) for each in downs], dim=1), strict=True):
            part.mul_(base.scaling)
            bias = None if base.bias is None else base.bias.to(x.dtype)
            out = biased_product(rows, base.weight.to(x.dtype), bias).addmm_(part, up.t())
            outputs.append(out.view(*x.shape[:-1], -1))
        ctx.bases, ctx.dtypes = bases, [each.dtype for each in factors]
        ctx.save_for_backward(rows, inside, down, *ups)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, inside, down, *ups = ctx.saved_tensors
        ranks, shape = [up.shape[1] for up in ups], (*gradients[0].shape[:-1], rows.shape[1])
        of_inside, of_ups, of_x = [], [], None
        for base, up, part, gradient in zip(ctx.bases, ups, inside.split(ranks, dim=1), gradients, strict=True):
            gradient = gradient.flatten(0, -2)
            of_inside.append((gradient @ up).mul_(base.scaling))
            of_ups.append(gradient.t() @ part)
            if ctx.needs_input_grad[0]:
                weight = base.weight.to(rows.dtype)
                of_x = gradient @ weight if of_x is None else of_x.addmm_(gradient, weight)
        joined = torch.cat(of_inside, dim=1)
        if of_x is not None:
            of_x = of_x.addmm_(joined, down).view(shape)
        factors = [*(joined.t() @ rows).split(ranks), *of_ups]
        return of_x, None, *(each.to(dtype) for each, dtype in zip(factors, ctx.dtypes, strict=True))
