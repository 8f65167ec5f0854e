"""``[tune]`` of a recipe: what trains in each tower, in the heads and in the scale of the logits."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TuneSettings(BaseModel):
    """``[tune]``: what trains, per tower; see ``clasp.models.tuning.spec``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: list[str] = Field(default=["none"], min_length=1)
    """Methods for the image tower"""
    text: list[str] = Field(default=["none"], min_length=1)
    """Methods for the text tower"""
    head: Literal["full", "none"] = "full"
    """The heads, with a learned pooling where there is one"""
    scale: Literal["full", "none"] = "full"
    """The scale and the bias of the logits"""
