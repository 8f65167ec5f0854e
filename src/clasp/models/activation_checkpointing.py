"""Activation checkpointing of blocks (Chen et al., 2016, "Training deep nets with sublinear memory cost").

In goes a block, out comes what stands in for its ``forward``: it keeps its input only, and computes the rest again in
the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CheckpointedForward:
    """The forward pass of a block, computed again in the backward pass where there will be one.

    An object, so that the copy of a tower computes the blocks of the copy.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self.trains = any(parameter.requires_grad for parameter in block.parameters())

    def __call__(self, *args: Any, **options: Any) -> Any:
        forward = partial(type(self.block).forward, self.block)
        given = (*args, *options.values())
        if torch.is_grad_enabled() and (self.trains or any(isinstance(x, Tensor) and x.requires_grad for x in given)):
            return checkpoint(forward, *args, use_reentrant=False, **options)
        return forward(*args, **options)
