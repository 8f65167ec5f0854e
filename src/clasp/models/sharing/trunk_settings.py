"""A single pre-trained trunk for both modalities: the keys of ``[share]`` besides the policy, and its default policy.

Data only. Note: nothing here imports torch, so that a recipe is checked at once.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from clasp.models.sharing.policy import SharingSettings

# the default policy: all of a block is shared except its norms and layer scales
DEFAULT_TRUNK_PARTS: dict[str, Any] = {"attention": "shared", "ffn": "shared"}
DEFAULT_TRUNK_POLICY = SharingSettings(**DEFAULT_TRUNK_PARTS)


class SingleTrunkSettings(BaseModel):
    """A single pre-trained trunk for both modalities: the keys of ``[share]`` besides the policy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trunk: Literal["image", "text"]
    """The modality whose pre-trained blocks are the trunk"""
    embedding: Literal["tower", "random"] = "tower"
    """Initialisation of the other modality's patch or token embedding: from its pre-trained tower, or random"""
    patch: int = Field(default=16, ge=1, le=4096)
    """Side of a patch in pixels, for a random patch embedding"""
    context: int = Field(default=77, ge=1, le=32_768)
    """Maximum caption length in tokens, for a random token embedding"""
