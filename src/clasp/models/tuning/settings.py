"""``[tune]`` of a recipe: the trainable parameters of each tower, of the projection heads and of the logit scale."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TuneSettings(BaseModel):
    """``[tune]``: the tuning methods of each tower; see ``clasp.models.tuning.spec``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: list[str] = Field(default=["none"], min_length=1)
    """Tuning methods of the image tower"""
    text: list[str] = Field(default=["none"], min_length=1)
    """Tuning methods of the text tower"""
    head: Literal["full", "none"] = "full"
    """Whether the projection heads train, with a learned pooling where there is one"""
    scale: Literal["full", "none"] = "full"
    """Whether the logit scale and the logit bias train"""
