"""The native encoders: an image transformer and a text transformer built from the same block.

Input: pixels or token ids. Output: hidden states; no other model or file is read. Settings describe the architecture,
so that ViT, DeiT, CLIP and MS-CLIP are values of them. Parameter names follow timm, as the papers' checkpoints do. The
convolutional stem and the parallel branch come from ``models.transformer.convolutions``; which weights two encoders
share is decided in ``models.sharing``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from torch import Tensor, nn

from clasp.models.transformer.blocks import Attention, Block, make_norm
from clasp.models.transformer.convolutions import (
    ConvStem,
    ParallelBranch,
    PatchEmbed,
)
from clasp.models.transformer.settings import (
    BlockSettings,
    ImageTransformerSettings,
    ParallelBranchSettings,
    TextTransformerSettings,
)
from clasp.types import UserError


class ImageTransformer(nn.Module):
    """Pixels to the states of all tokens after the final norm, class token first.

    Patch embedding (or stem), class token, learned positions, optional entry norm, blocks, final norm (none with
    post-norm blocks). With DeiT settings the vision transformer of Touvron et al. (ICML 2021); with CLIP's, that of
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
        self.norm_pre = make_norm(settings, width) if settings.entry_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(settings, causal=False) for _ in range(first, settings.layers))
        self.parallel = None if settings.branch is None else _make_parallel_branch(settings, settings.branch)
        self.norm = _final_norm(settings)

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "_ N D"]:
        # x has as many rows as pixels, except where a partial forward continues from cached states
        # (models.partial_forward)
        x = self.patch_embed(pixels)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
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
        """Add a parallel branch to an existing encoder, initialised from ``seed``; returns its parameter names.

        A gated branch leaves the output unchanged until its gates are trained. Raises ``UserError`` where it does not
        fit.
        """
        if self.parallel is not None:
            raise UserError(f"branch.kind = {branch.kind!r}: the net has a branch already")
        try:
            # model_copy would not validate
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
        branch, patch=settings.patch, width=settings.width, before=before, state_norm=partial(make_norm, settings)
    )


def _final_norm(settings: BlockSettings) -> nn.Module:
    return make_norm(settings, settings.width) if settings.norm_position == "pre" else nn.Identity()


@dataclass(slots=True)
class EncoderOutput:
    """Output of an encoder that is called as those of ``transformers``, whose field name this is."""

    last_hidden_state: Float[Tensor, "B N D"]


class TextTransformer(nn.Module):
    """Token ids to states after the final norm: token embedding, learned positions, optional entry norm, blocks, norm.

    With CLIP's settings the text transformer of Radford et al. (ICML 2021), without its projection; post-norm with an
    entry norm, BERT (Devlin et al., 2019), which has no final norm.
    """

    def __init__(self, settings: TextTransformerSettings):
        super().__init__()
        self.settings = settings
        causal = settings.attention == "causal"
        token_width = settings.token_width
        self.token_embed = nn.Embedding(settings.vocabulary, token_width or settings.width)
        self.token_map = nn.Linear(token_width, settings.width, bias=False) if token_width else nn.Identity()
        self.pos_embed = nn.Parameter(torch.zeros(1, settings.context, settings.width))
        self.norm_pre = make_norm(settings, settings.width) if settings.entry_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(settings, causal=causal) for _ in range(settings.layers))
        self.norm = _final_norm(settings)

    def forward(self, input_ids: Int[Tensor, "B N"], attention_mask: Int[Tensor, "B N"]) -> EncoderOutput:
        """States of every token. Raises ``UserError`` for captions longer than the context."""
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
        return EncoderOutput(self.norm(x))


def init_weights(module: nn.Module, *, seed: int) -> None:
    """Initialise from ``seed`` as MS-CLIP does: matrices and kernels truncated N(0, 0.02), packed QKV Xavier-uniform,
    biases zero, positions N(0, 1/sqrt(D)) for images and N(0, 0.02) for text. Meta tensors are left as they are.

    Ours differs in the token embedding, whose deviation is ``token_std``: 0.02 by default, 1 in MS-CLIP. A token map
    preserves that deviation.
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
