"""Whether the parts that a recipe sizes fit into memory: its own nets and the projection heads.

Input: a module on the meta device. Output: none, or a ``UserError``. Note: only weights are counted; a step needs more,
which ``clasp doctor`` measures. What is asked for is not allocated, since a system may promise more than it has.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from clasp.training.memory import free_bytes
from clasp.types import UserError


def require_memory(module: nn.Module, what: str, remedy: str) -> None:
    """Raises ``UserError`` where the tensors of ``module`` take more than the memory that is free."""
    needed = sum(each.numel() * each.element_size() for each in chain(module.parameters(), module.buffers()))
    free = free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise UserError(
            f"the weights of {what} take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free; {remedy}"
        )
