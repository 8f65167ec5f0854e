"""Projection heads: from the pooled vector of a tower to the joint embedding space.

Input: settings and the tower's width. Output: a module ``[B D] -> [B E]``. Linear as in CLIP, an MLP beside a linear
map, a gated layer, or none; features may be standardised, noised and dropped out before. Two towers may share one head;
that is decided by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor, nn

from clasp.models.standardize import Standardize
from clasp.types import UserError

_Power = Annotated[float, Field(gt=0, le=1)]


class HeadSettings(BaseModel):
    """``[head]`` of a recipe: the projection head, with the same settings for both towers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["linear", "mlp", "glu", "none"] = "linear"
    """``mlp``: a hidden layer beside the linear map; ``glu``: a gated layer (SAIL); ``none``: identity, for equal
    widths"""
    width: int = Field(default=512, ge=1, le=65_536)
    """E, the width of the joint space"""
    hidden: int | None = Field(default=None, ge=1, le=1_048_576)
    """Hidden width of mlp and glu; by default twice ``width``"""
    bias: bool = True
    """Whether a linear head has a bias; not in CLIP and MS-CLIP"""
    standardize: bool | Literal["layer"] = False
    """A learned shift and factor per feature, initialised to standardise the training pairs (Glow's ActNorm); "layer":
    factors start as one for all features of a pooled layer, so that rare features stay small"""
    power: tuple[_Power, _Power] = (1.0, 1.0)
    """Power normalisation of the pooled features, image and text, before they are standardised: ``sign(x) |x|^power``;
    0.5 is the signed square root (Perronnin et al., ECCV 2010)"""
    class_probabilities: bool = False
    """Whether the image head also reads the class probabilities of the classifier that the image tower was pre-trained
    with, beside the pooled features; needs ``standardize = "layer"``"""
    init: Literal["random", "cca", "pretrained"] = "random"
    """``cca``: linear heads are initialised in closed form by canonical correlation analysis; needs ``standardize`` and
    frozen towers. ``pretrained``: heads, logit scale and logit bias are those of the dual encoder that the towers come
    from (``clip:``, ``open_clip:``); the head of a tower without is initialised at random"""
    ridge: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Ridge penalties of the CCA, image and text, in units of a feature's variance"""
    mean_shrinkage: Annotated[float, Field(gt=0, le=1)] | None = None
    """Shrinkage of the mean of the training images, which a CCA subtracts from the image features: this fraction of the
    way towards the mean over all features of a layer, or over all class probabilities (Efron & Morris, 1973); for
    training images unlike those to come, as drawings are unlike photographs. Needs ``standardize = "layer"`` and
    ``init = "cca"``; left out: none"""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of the Gaussian noise added to the features during training"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the features"""

    @property
    def hidden_width(self) -> int:
        """Width of the hidden layer of mlp and glu."""
        return self.hidden or 2 * self.width

    @model_validator(mode="after")
    def _bias_of_a_linear_map(self) -> HeadSettings:
        if not self.bias and self.kind != "linear":
            raise ValueError(f"bias = false is for kind = 'linear'; here kind = {self.kind!r}")
        if not self.bias and self.init == "cca":
            raise ValueError("init = 'cca' needs a bias; here bias = false")
        return self

    @model_validator(mode="after")
    def _features_are_standardized(self) -> HeadSettings:
        if self.power != (1.0, 1.0) and not self.standardize:
            raise ValueError(
                f"power = {list(self.power)} needs standardize = true or 'layer'; here standardize = false"
            )
        if self.class_probabilities and self.standardize != "layer":
            raise ValueError(
                "class_probabilities = true needs standardize = 'layer': the probability of a class that the training "
                f"images do not show is near 0; here standardize = {str(self.standardize).lower()}"
            )
        return self

    @model_validator(mode="after")
    def _mean_of_a_layer(self) -> HeadSettings:
        if self.mean_shrinkage is not None and (self.standardize != "layer" or self.init != "cca"):
            raise ValueError(
                f"mean_shrinkage = {self.mean_shrinkage:g} needs standardize = 'layer' and init = 'cca'; here "
                f"standardize = {str(self.standardize).lower()}, init = {self.init!r}"
            )
        return self

    @model_validator(mode="after")
    def _projections_are_linear(self) -> HeadSettings:
        if self.init == "pretrained" and (self.kind not in ("linear", "none") or self.standardize):
            found = "standardize = true" if self.kind in ("linear", "none") else f"kind = {self.kind!r}"
            raise ValueError(
                f"init = 'pretrained' needs kind = 'linear' or 'none', and standardize = false; here {found}"
            )
        return self


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
