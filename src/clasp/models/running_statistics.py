"""Running statistics of BatchNorm: fixed in a pre-trained net, updated where a randomly initialised norm trains.

Input: a tower. Output: its BatchNorms whose statistics are updated in training, and those statistics by name, as they
are saved in a delta.
"""

from __future__ import annotations

from torch import Tensor, nn


def batch_norms(tower: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorms of a tower by path."""
    return {path: m for path, m in tower.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def trains_norm(norm: nn.Module) -> bool:
    """Whether a norm has trainable parameters."""
    return any(parameter.requires_grad for parameter in norm.parameters())


def updated_statistics(tower: nn.Module) -> dict[str, Tensor]:
    """The running statistics of the BatchNorms of a randomly initialised tower that train, by name."""
    moving = {path: norm for path, norm in batch_norms(tower).items() if trains_norm(norm)}
    return {f"{path}.{name}": buffer for path, norm in moving.items() for name, buffer in norm.named_buffers()}
