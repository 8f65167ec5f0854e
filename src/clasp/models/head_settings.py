"""``[head]`` of a recipe: the projection head of both towers.

Data only. Note: nothing here imports torch, so that a recipe is checked at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

_Power = Annotated[float, Field(gt=0, le=1)]
_CorrelationPower = Annotated[float, Field(ge=0.25, le=8)]  # a lower one lets in directions that are noise


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
    correlation_power: tuple[_CorrelationPower, _CorrelationPower] = (1.0, 1.0)
    """Powers of its correlation that weight a direction of the CCA, image and text (Gong et al., IJCV 2014). Their sum
    is that of the products of embeddings; their difference, what unit length divides by. Needs ``init = "cca"``"""
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
    def _correlations_of_a_cca(self) -> HeadSettings:
        if self.correlation_power != (1.0, 1.0) and self.init != "cca":
            raise ValueError(
                f"correlation_power = {list(self.correlation_power)} needs init = 'cca'; here init = {self.init!r}"
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
