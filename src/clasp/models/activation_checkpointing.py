"""Activation checkpointing of blocks (Chen et al., 2016, "Training deep nets with sublinear memory cost").

Input: a block. Output: a replacement for its ``forward`` that saves the block's input only and recomputes its
activations in the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CheckpointedForward:
    """The forward pass of a block, recomputed in the backward pass where a gradient goes through it.

    An object rather than a closure, so that a deep copy of a tower runs the copied blocks.
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
