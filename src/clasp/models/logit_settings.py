"""The part of ``[loss]`` of a recipe on the logit scale.

Data only. Note: nothing here imports torch, so that a recipe is checked at once.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clasp.errors import UserError


class LogitSettings(BaseModel):
    """The part of ``[loss]`` on the logit scale, by which cosines are multiplied. Defaults: CLIP's (section 2.5)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Literal["log", "temperature"] = "log"
    """The learned parameter. ``log``: the logarithm of the logit scale, clamped to its range after each step.
    ``temperature``: LilT's temperature, the reciprocal of the scale; it is clamped in place before each use, and its
    gradient is that at the clamped value"""
    init_logit_scale: float = Field(default=1 / 0.07, gt=0, allow_inf_nan=False)
    """Initial logit scale"""
    scale_range: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 100.0)
    """Least and greatest logit scale; 0 and inf leave that side unbounded"""

    @model_validator(mode="after")
    def _in_range(self) -> LogitSettings:
        least, greatest = self.scale_range
        if not least < greatest:
            raise UserError(f"scale_range = [{least:g}, {greatest:g}] is not a least and a greatest scale")
        if not least <= self.init_logit_scale <= greatest:
            raise UserError(
                f"init_logit_scale = {self.init_logit_scale:g} is outside scale_range = [{least:g}, {greatest:g}]"
            )
        if self.scale == "temperature" and greatest == math.inf:
            raise UserError("scale = 'temperature' needs a greatest scale in scale_range: nothing is divided by 0")
        return self
