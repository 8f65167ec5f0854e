"""Settings of the native encoders and of their modules: what a recipe has under ``[image.net]`` and ``[text.net]``.

Data only; ViT, DeiT, CLIP and MS-CLIP are values of them. Note: nothing here imports torch, so that a recipe is checked
at once.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ConvNormKind = Literal["batch", "group"]
STEM_STAGES = 4


class BlockSettings(BaseModel):
    """Hyperparameters of the blocks of an encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(ge=1, le=65_536)
    """D, the width of the states"""
    heads: int = Field(ge=1)
    """Attention heads; must divide ``width``"""
    hidden: int | None = Field(default=None, ge=1, le=1_048_576)
    """Width inside the feed-forward part; four times ``width`` where left out"""
    activation: Literal["gelu", "quick-gelu"] = "gelu"
    """Inside the feed-forward part"""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: norms before attention and feed-forward, and a final norm after the last block; post: norms after each
    residual sum (Vaswani et al., 2017), as in BERT, and no final norm"""
    norm: Literal["layer", "rms"] = "layer"
    """The norm used throughout the encoder: LayerNorm, or RMSNorm (Zhang and Sennrich, 2019)"""
    eps: float = Field(default=1e-6, gt=0)
    """Epsilon of every norm"""
    qk_norm: bool = False
    """Normalise the queries and keys of each head (Henry et al., 2020), which bounds the attention logits"""
    layer_scale: float | None = None
    """Initial value of the per-channel layer scale on each residual branch (Touvron et al., 2021); 1e-4 in DeiT-III"""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> BlockSettings:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        return self

    @property
    def mlp_width(self) -> int:
        """Width inside the feed-forward part."""
        return self.hidden or 4 * self.width


class ParallelBranchSettings(BaseModel):
    """A convolutional branch in parallel to the blocks of an image net."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["paper", "gated"] = "paper"
    """paper: MS-CLIP's; gated: ours, without BatchNorm, zero at initialisation"""
    before: tuple[int, ...] = Field(default=(2, 4, 6, 8, 10), min_length=1, max_length=5)
    """Layers before which it is added to the tokens, counted from 0; a stem is layer 0"""

    @model_validator(mode="after")
    def _rising(self) -> ParallelBranchSettings:
        if list(self.before) != sorted(set(self.before)) or self.before[0] < 0:
            raise ValueError(f"before = {list(self.before)} is not a rising list of layers, such as [2, 4, 6, 8, 10]")
        return self


class ImageTransformerSettings(BlockSettings):
    """Architecture of an image encoder: input size, layers, and the image-only modules."""

    size: int = Field(ge=1, le=4096)
    """Side of the input image, pixels"""
    patch: int = Field(ge=1)
    """Side of one patch, pixels"""
    layers: int = Field(ge=1, le=1024)
    """Blocks; a stem replaces the first"""
    stem: ConvNormKind | None = None
    """Early specialisation (MS-CLIP): convolutions in place of the patch embedding and layer 0, with this kind of
    norm"""
    branch: ParallelBranchSettings | None = None
    """A parallel convolutional branch, added to the tokens before some layers"""
    patch_bias: bool = True
    """Whether the patch embedding has a bias"""
    class_position: bool = True
    """Whether the class token has a position embedding; not in DeiT-III"""
    entry_norm: bool = False
    """A norm before the first block, as in CLIP"""

    @model_validator(mode="after")
    def _fits(self) -> ImageTransformerSettings:
        if self.size % self.patch:
            raise ValueError(f"patch = {self.patch} does not divide size = {self.size}")
        if self.stem is None and self.branch is None:
            return self
        module = "a stem" if self.stem else "a parallel branch"
        widest = 1 << (STEM_STAGES + 1)
        if self.patch & (self.patch - 1) or not 2 <= self.patch <= widest:
            raise ValueError(f"patch = {self.patch}: {module} halves images, so patch is one of 2, 4, 8, 16, {widest}")
        if self.width % 16:
            raise ValueError(f"width = {self.width}: {module} begins with a sixteenth of it, so 16 divides it")
        if self.branch is not None and not self.first_layer <= self.branch.before[0] <= self.branch.before[-1] < (
            self.layers
        ):
            raise ValueError(
                f"before = {list(self.branch.before)}: the branch joins before a block, and there are blocks at layers "
                f"{self.first_layer} to {self.layers - 1}"
            )
        return self

    @property
    def first_layer(self) -> int:
        """Layer number of the first block: 1 with a stem (which is layer 0), else 0."""
        return 0 if self.stem is None else 1

    @property
    def patches(self) -> int:
        """Patch tokens of an image, without the class token."""
        return (self.size // self.patch) ** 2


class TextTransformerSettings(BlockSettings):
    """Architecture of a text encoder: vocabulary, context, layers and attention."""

    vocabulary: int = Field(ge=1, le=1_048_576)
    """Number of token ids"""
    context: int = Field(ge=1, le=32_768)
    """Maximum caption length, tokens"""
    layers: int = Field(ge=1, le=1024)
    """Blocks"""
    token_width: int | None = Field(default=None, ge=1, le=65_536)
    """Width of the token embedding if factorised: a linear map projects it to ``width`` (ALBERT, Lan et al., 2020); by
    default ``width``, without a map"""
    attention: Literal["causal", "bidirectional"] = "causal"
    """causal: a token attends to itself and those before it, padding must be on the right; bidirectional: a token
    attends to all real tokens"""
    entry_norm: bool = False
    """A norm before the first block; in MS-CLIP for images only"""
    token_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the token embedding at initialisation; 1 in MS-CLIP"""
