"""Our own nets: an image transformer and a text transformer of one kind of block.

In go pixels or token ids, out come states; no file, no other model. Settings say what a net is like, so that ViT, DeiT,
CLIP and MS-CLIP are values of them. Names are timm's, which papers' checkpoints carry. A convolutional stem, or a
parallel branch, comes from ``nn.convolutions``; what two nets have in common is decided by ``nn.shared``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from clasp.models.transformer.blocks import Attention, Block, BlockSettings
from clasp.models.transformer.convolutions import (
    STEM_STAGES,
    ConvNormKind,
    ConvStem,
    ParallelBranch,
    ParallelBranchSettings,
    PatchEmbed,
)
from clasp.types import UserError


class ImageTransformerSettings(BlockSettings):
    """An image net: its pictures, its layers, and what is there for images only."""

    size: int = Field(ge=1)
    """Pixels a side"""
    patch: int = Field(ge=1)
    """Pixels a side of one token"""
    layers: int = Field(ge=1)
    """Blocks; a stem stands in place of the first"""
    stem: ConvNormKind | None = None
    """Early specialisation: convolutions in place of patches and layer 0, with this kind of norm"""
    branch: ParallelBranchSettings | None = None
    """A parallel branch of convolutions that joins the tokens before some layers"""
    patch_bias: bool = True
    """Whether the patch embedding has a bias"""
    class_position: bool = True
    """Whether the class token has a position of its own; DeiT-III's has none"""
    entry_norm: bool = False
    """A norm before the first block, as CLIP has it"""

    @model_validator(mode="after")
    def _fits(self) -> ImageTransformerSettings:
        if self.size % self.patch:
            raise ValueError(f"patch = {self.patch} does not divide size = {self.size}")
        if self.stem is None and self.branch is None:
            return self
        what = "a stem" if self.stem else "a parallel branch"
        widest = 1 << (STEM_STAGES + 1)
        if self.patch & (self.patch - 1) or not 2 <= self.patch <= widest:
            raise ValueError(f"patch = {self.patch}: {what} halves pictures, so patch is one of 2, 4, 8, 16, {widest}")
        if self.width % 16:
            raise ValueError(f"width = {self.width}: {what} begins with a sixteenth of it, so 16 divides it")
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
        """The layer that is the first block: 1 where a stem is layer 0."""
        return 0 if self.stem is None else 1

    @property
    def patches(self) -> int:
        """Tokens of a picture, without the class token."""
        return (self.size // self.patch) ** 2


class ImageTransformer(nn.Module):
    """Pixels to all tokens after the final norm, class token first.

    Patches (or a stem), class token, learned positions, entry norm where wanted, blocks, final norm (none after blocks
    that end with one). With DeiT settings the vision transformer of Touvron et al. (ICML 2021); with CLIP's, that of
    Radford et al. (ICML 2021).
    """

    def __init__(self, settings: ImageTransformerSettings):
        super().__init__()
        self.settings, self.size = settings, settings.size
        width, first = settings.width, settings.first_layer
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, settings.patches + settings.class_position, width))
        self.patch_embed: nn.Module = (
            PatchEmbed(settings.patch, width, bias=settings.patch_bias)
            if settings.stem is None
            else ConvStem(settings.patch, width, settings.stem)
        )
        self.norm_pre = settings.make_norm(width) if settings.entry_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(settings, causal=False) for _ in range(first, settings.layers))
        self.parallel = None if settings.branch is None else _make_parallel_branch(settings, settings.branch)
        self.norm = _final_norm(settings)

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "_ N D"]:
        # as many rows as pixels, but for a net that goes on from given states (nn.trunk)
        x = self.patch_embed(pixels)
        cls = self.cls_token.expand(len(x), -1, -1)
        if self.settings.class_position:
            x = torch.cat((cls, x), dim=1) + self.pos_embed
        else:
            x = torch.cat((cls, x + self.pos_embed), dim=1)
        x, maps = self.norm_pre(x), pixels
        for number, block in enumerate(self.blocks):
            if self.parallel is not None and number in self.parallel.stage_by_block:
                x, maps = self.parallel(number, x, maps)
            x = block(x)
        return self.norm(x)

    def add_parallel_branch(self, branch: ParallelBranchSettings, *, seed: int) -> set[str]:
        """Put a branch beside the blocks of a net that is there already; returns the names of its parameters.

        A gated branch changes no output until its gates move. Raises ``UserError`` where it does not fit the net.
        """
        if self.parallel is not None:
            raise UserError(f"branch.kind = {branch.kind!r}: the net has a branch already")
        try:
            # model_copy would not check anything
            self.settings = ImageTransformerSettings(**{**self.settings.model_dump(), "branch": branch.model_dump()})
        except ValidationError as error:
            raise UserError(f"branch: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
        with torch.device(self.cls_token.device):
            self.parallel = _make_parallel_branch(self.settings, branch).to(self.cls_token.dtype).train(self.training)
        init_weights(self.parallel, seed=seed)
        return {f"parallel.{name}" for name, _ in self.parallel.named_parameters()}


def _make_parallel_branch(settings: ImageTransformerSettings, branch: ParallelBranchSettings) -> ParallelBranch:
    before = [layer - settings.first_layer for layer in branch.before]
    return ParallelBranch(
        branch, patch=settings.patch, width=settings.width, before=before, state_norm=settings.make_norm
    )


def _final_norm(settings: BlockSettings) -> nn.Module:
    return settings.make_norm(settings.width) if settings.norm_position == "pre" else nn.Identity()


class TextTransformerSettings(BlockSettings):
    """A text net: its tokens, its layers, and which way it reads."""

    vocabulary: int = Field(ge=1)
    """Token ids"""
    context: int = Field(ge=1)
    """Tokens of the longest caption"""
    layers: int = Field(ge=1)
    """Blocks"""
    token_width: int | None = Field(default=None, ge=1)
    """Width of the token embedding, which a linear map then brings to ``width`` (ALBERT, Lan et al., 2020); where left
    out, it is as wide as the states and there is no map"""
    attention: Literal["causal", "bidirectional"] = "causal"
    """causal: a token sees those before it, and padding must stand at the end; bidirectional: all real ones"""
    entry_norm: bool = False
    """A norm before the first block; MS-CLIP has it for images only"""
    token_std: float = Field(default=0.02, gt=0)
    """Deviation of the token embedding at the start; MS-CLIP has 1"""


@dataclass(slots=True)
class TextTransformerOutput:
    """What a text net gives, spelt as ``transformers`` spells it."""

    last_hidden_state: Float[Tensor, "B N D"]


class TextTransformer(nn.Module):
    """Token ids to states after the final norm: tokens, learned positions, entry norm where wanted, blocks, final norm.

    With CLIP's settings the text transformer of Radford et al. (ICML 2021), without its projection; in the order "post"
    with an entry norm, BERT (Devlin et al., 2019), which has no final norm.
    """

    def __init__(self, settings: TextTransformerSettings):
        super().__init__()
        self.settings = settings
        causal = settings.attention == "causal"
        narrow = settings.token_width
        self.token_embed = nn.Embedding(settings.vocabulary, narrow or settings.width)
        self.token_map = nn.Linear(narrow, settings.width, bias=False) if narrow else nn.Identity()
        self.pos_embed = nn.Parameter(torch.zeros(1, settings.context, settings.width))
        self.norm_pre = settings.make_norm(settings.width) if settings.entry_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(settings, causal=causal) for _ in range(settings.layers))
        self.norm = _final_norm(settings)

    def forward(self, input_ids: Int[Tensor, "B N"], attention_mask: Int[Tensor, "B N"]) -> TextTransformerOutput:
        """States of every token. Raises ``UserError`` for captions longer than there are positions."""
        longest, context = input_ids.shape[1], self.settings.context
        if longest > context:
            raise UserError(
                f"a caption of {longest} tokens is too long: the text net has {context} positions; set "
                f"text.max_tokens = {context}"
            )
        x = self.norm_pre(self.token_map(self.token_embed(input_ids)) + self.pos_embed[:, :longest])
        mask = attention_mask.bool()
        for block in self.blocks:
            x = block(x, mask)
        return TextTransformerOutput(self.norm(x))


def init_weights(module: nn.Module, *, seed: int) -> None:
    """Start from ``seed`` as MS-CLIP does: matrices and kernels truncated N(0, 0.02), packed queries, keys and values
    Xavier-uniform, biases zero, positions N(0, 1/sqrt(D)) for images and N(0, 0.02) for text. Nothing on meta tensors.

    Ours differs in the token embedding, which starts as the settings of the net say: 0.02 where MS-CLIP has 1. A map
    after it gives states of that deviation too.
    """
    if next(module.parameters()).is_meta:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for part in module.modules():  # after their linear layers
            if isinstance(part, Attention):
                nn.init.xavier_uniform_(part.qkv.get_parameter("weight"))
            elif isinstance(part, ImageTransformer):
                nn.init.normal_(part.cls_token, std=part.settings.width**-0.5)
                nn.init.normal_(part.pos_embed, std=part.settings.width**-0.5)
            elif isinstance(part, TextTransformer):
                nn.init.normal_(part.token_embed.weight, std=part.settings.token_std)
                if isinstance(part.token_map, nn.Linear):
                    nn.init.normal_(part.token_map.weight, std=part.token_map.in_features**-0.5)
                nn.init.normal_(part.pos_embed, std=0.02)
