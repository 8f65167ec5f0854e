"""Projection heads: from the pooled vector of a tower to the joint embedding space.

Input: settings and the tower's width. Output: a module ``[B D] -> [B E]``. Linear as in CLIP, an MLP beside a linear
map, a gated layer, or none; features may be standardised, noised and dropped out before. Two towers may share one head;
that is decided by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clasp.models.head_settings import HeadSettings
from clasp.models.standardize import Standardize
from clasp.types import UserError


class GaussianNoise(nn.Module):
    """Adds Gaussian noise in training mode; the identity in eval mode."""

    def __init__(self, deviation: float):
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return x + self.deviation * torch.randn_like(x) if self.training and self.deviation else x


class LinearWithMLP(nn.Module):
    """``linear(x) + out(gelu(inner(x)))``; ``out`` starts at zero, so that it starts as the linear map."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.linear, self.inner, self.out = nn.Linear(width, out), nn.Linear(width, hidden), nn.Linear(hidden, out)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        return self.linear(x) + self.out(F.gelu(self.inner(x)))


class GatedLinear(nn.Module):
    """``out(silu(gate(x)) * up(x))``: the gated head of SAIL (Zhang et al., CVPR 2025), with SiLU instead of ReLU6."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.gate, self.up, self.out = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        return self.out(F.silu(self.gate(x)) * self.up(x))


def _identity(width: int, settings: HeadSettings) -> nn.Module:
    if width != settings.width:
        raise UserError(
            f"head.kind = 'none' does not project pooled vectors: their width {width} is not "
            f"head.width = {settings.width}"
        )
    return nn.Identity()


HEAD_MAPS: dict[str, Callable[[int, HeadSettings], nn.Module]] = {
    "linear": lambda width, settings: nn.Linear(width, settings.width, bias=settings.bias),
    "mlp": lambda width, settings: LinearWithMLP(width, settings.hidden_width, settings.width),
    "glu": lambda width, settings: GatedLinear(width, settings.hidden_width, settings.width),
    "none": _identity,
}
"""``head.kind`` to a module from a pooled vector of some width to the joint space"""


class ProjectionHead(nn.Module):
    """A pooled vector to the joint space, before L2 normalisation; ``standardize`` is applied first."""

    def __init__(self, width: int, settings: HeadSettings, standardize: Standardize | None = None):
        super().__init__()
        self.standardize = standardize
        width = width if standardize is None else standardize.width
        self.noise, self.dropout = GaussianNoise(settings.noise), nn.Dropout(settings.dropout)
        self.map: nn.Module = HEAD_MAPS[settings.kind](width, settings)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        if self.standardize is not None:
            x = self.standardize(x)
        return self.map(self.dropout(self.noise(x)))

    @torch.no_grad()
    def copy_projection(self, weight: Float[Tensor, "E D"] | None) -> None:
        """Make the linear map this projection without a bias; ``None``: the identity. No shape is checked."""
        if isinstance(self.map, nn.Linear):
            found = torch.eye(self.map.out_features) if weight is None else weight
            self.map.weight.copy_(found.to(self.map.weight.device))
            if self.map.bias is not None:
                self.map.bias.zero_()


def to_unit_length(x: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
    """L2-normalised rows in float32, as ``F.normalize``; of rows in half precision the gradient is that of
    autograd within rounding, in four passes in place of ten."""
    if x.dtype in (torch.bfloat16, torch.float16) and x.requires_grad and torch.is_grad_enabled():
        return _UnitLength.apply(x)  # pyright: ignore[reportReturnType]
    return F.normalize(x.float(), dim=-1)


class _UnitLength(torch.autograd.Function):
    """``x / max(|x|, 1e-12)`` over the last axis, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        exact = x.float()
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).clamp_(min=1e-12)
        unit = exact.div_(length)
        ctx.save_for_backward(unit, length)
        ctx.dtype = x.dtype
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        unit, length = ctx.saved_tensors
        along = (unit * gradients[0]).sum(-1, keepdim=True)
        return torch.addcmul(gradients[0], unit, along, value=-1).div_(length).to(ctx.dtype)
