"""The forward pass of a LoRA layer in bfloat16: the update is added in its second product.

Input: a layer that peft has wrapped. Output: a replacement for its ``forward``. Note: peft scales the update and adds
it in passes of their own over the output, forward and backward; a step over both towers takes 4 % less without them.
Outputs and gradients are peft's within bfloat16's rounding; in float32, peft's own is called. Without gradients the
products are the same, in place: gradient caching embeds once in each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clasp.models.frozen_casts import is_plain_low_rank


class LowRankForward:
    """``x W + b + (s x A) B`` as two products in addition to that of the base layer (Hu et al., ICLR 2022, equation 3).

    An object rather than a closure, so that a deep copy of a tower runs the copied layers.
    """

    def __init__(self, wrapper: Any, adapter: str):
        self.wrapper, self.adapter = wrapper, adapter

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        layer, name = self.wrapper, self.adapter
        joined = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if not joined or layer.disable_adapters or layer.merged or args or options:
            return type(layer).forward(layer, x, *args, **options)
        base = layer.base_layer(x)
        inside = layer.lora_A[name](layer.lora_dropout[name](x)) * layer.scaling[name]
        up = layer.lora_B[name].weight
        if torch.is_grad_enabled():
            return torch.addmm(base.flatten(0, -2), inside.flatten(0, -2), up.t()).view_as(base)
        base.view(-1, base.shape[-1]).addmm_(inside.flatten(0, -2), up.to(base.dtype).t())
        return base


def join_low_rank_update(wrapper: nn.Module, adapter: str) -> None:
    """Replace the ``forward`` of a plain LoRA layer over an ``nn.Linear``; other layers are left as they are."""
    layer: Any = wrapper
    if not (is_plain_low_rank(wrapper) and isinstance(layer.base_layer, nn.Linear)):
        return
    if not layer.lora_variant and layer.lora_B[adapter].bias is None:
        vars(wrapper)["forward"] = LowRankForward(wrapper, adapter)
