"""Heads: from the pooled vector of a tower to the joint space.

In go settings and a width, out comes a module, vectors in and vectors out. Linear as in CLIP, or one of three that keep
a linear path or gate it; a feature may be shifted, scaled, noised and dropped before. Two towers may hold one head in
common; that is up to who makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor, nn

from clasp.types import UserError


class HeadSettings(BaseModel):
    """``[head]`` of a recipe: from a tower's pooled vector to the joint space, the same for both towers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["linear", "mlp", "glu", "none"] = "linear"
    """``mlp``: a hidden layer beside the linear map; ``glu``: a gated layer (SAIL); ``none`` joins equal widths"""
    width: int = Field(default=512, ge=1)
    """E, the width of the joint space"""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the hidden layer of mlp and glu; twice ``width`` where left out"""
    bias: bool = True
    """Whether a linear head has a bias; CLIP's and MS-CLIP's have none"""
    standardize: bool = False
    """Shift and scale each feature, starting from the training pairs' mean and deviation (Glow's ActNorm)"""
    init: Literal["random", "cca"] = "random"
    """``cca``: linear heads start where canonical correlation has them in closed form; needs ``standardize`` and frozen
    towers"""
    ridge: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Ridges of that closed form, image and text, in units of a feature's variance"""
    noise: float = Field(default=0.0, ge=0)
    """Deviation of the Gaussian noise added to the features while training"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the features dropped while training"""

    @property
    def hidden_width(self) -> int:
        """Width of the hidden layer of mlp and glu."""
        return self.hidden or 2 * self.width

    @model_validator(mode="after")
    def _bias_of_a_linear_map(self) -> HeadSettings:
        if not self.bias and self.kind != "linear":
            raise ValueError(f"bias = false is for kind = 'linear'; here kind = {self.kind!r}")
        if not self.bias and self.init == "cca":
            raise ValueError("start = 'cca' needs the bias that bias = false leaves out")
        return self


class Standardize(nn.Module):
    """``x * scale + shift`` per feature, starting from data (``fit``; Kingma & Dhariwal, 2018, section 3.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def fit(self, features: Float[Tensor, "n D"]) -> None:
        """Make ``features`` come out with mean 0 and deviation 1. Constant features stay small."""
        deviation, mean = torch.std_mean(features.double(), dim=0, correction=0)
        scale = 1 / deviation.clamp(min=1e-3 * float(deviation.median()) + 1e-12)
        with torch.no_grad():
            self.scale.copy_(scale)
            self.shift.copy_(-mean * scale)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return x * self.scale + self.shift


class GaussianNoise(nn.Module):
    """Gaussian noise while training, nothing otherwise."""

    def __init__(self, deviation: float):
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return x + self.deviation * torch.randn_like(x) if self.training and self.deviation else x


class LinearWithMLP(nn.Module):
    """``linear(x) + out(gelu(inner(x)))``; starts as the linear map alone."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.linear, self.inner, self.out = nn.Linear(width, out), nn.Linear(width, hidden), nn.Linear(hidden, out)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        return self.linear(x) + self.out(F.gelu(self.inner(x)))


class GatedLinear(nn.Module):
    """``out(silu(gate(x)) * up(x))``: the gated head of SAIL (Zhang et al., CVPR 2025), with SiLU for its ReLU6."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.gate, self.up, self.out = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        return self.out(F.silu(self.gate(x)) * self.up(x))


def _identity(width: int, settings: HeadSettings) -> nn.Module:
    if width != settings.width:
        raise UserError(
            f"head.kind = 'none' joins pooled vectors as they are: width {width} is not head.width = {settings.width}"
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
    """A pooled vector to the joint space, before normalisation."""

    def __init__(self, width: int, settings: HeadSettings):
        super().__init__()
        self.standardize = Standardize(width) if settings.standardize else None
        self.noise, self.dropout = GaussianNoise(settings.noise), nn.Dropout(settings.dropout)
        self.map: nn.Module = HEAD_MAPS[settings.kind](width, settings)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        if self.standardize is not None:
            x = self.standardize(x)
        return self.map(self.dropout(self.noise(x)))
