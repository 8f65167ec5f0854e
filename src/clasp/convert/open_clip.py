"""A run with open_clip's interface: ``(model, preprocess, tokenizer)``, as CLIP_benchmark and ELEVATER use them.

Input: a run. Output: a module with ``encode_image(pixels, normalize=False)``, ``encode_text(tokens, normalize=False)``
and ``logit_scale`` (a logarithm), the transform of one Pillow image, and a tokenizer of strings to ``[n N]`` int64.
Note: embeddings are not normalised unless asked for, as in open_clip, and unlike ``EmbeddingModel``. The tokenizer
marks padding with -1, from which the attention mask is read, since the padding id of some tokenizers is also the id of
a real token; open_clip pads with 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clasp.config.build import load
from clasp.data.images import ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.models.dual_encoder import DualEncoder
from clasp.types import Pixels, Tokens, UserError

PADDING = -1
"""Where ``OpenClipTokenizer`` has no token"""


class OpenClipModel(nn.Module):
    """A ``DualEncoder`` under the method names of ``open_clip.CLIP``; in evaluation mode."""

    logit_scale: Tensor
    """Logarithm of the logit scale"""
    logit_bias: Tensor | None

    def __init__(self, encoder: DualEncoder, pad_id: int):
        super().__init__()
        self.encoder, self._pad_id = encoder, pad_id
        scale, bias = (None if each is None else each.detach() for each in encoder.scale_and_bias())
        assert scale is not None
        self.register_buffer("logit_scale", scale.log())
        self.register_buffer("logit_bias", bias)
        self.eval()

    def encode_image(self, image: Float[Tensor, "B 3 height width"], normalize: bool = False) -> Float[Tensor, "B E"]:
        """Pixels of ``preprocess`` to embeddings."""
        features = self.encoder.image_head(self.encoder.image.pooled(Pixels(image))).float()
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Int[Tensor, "B N"], normalize: bool = False) -> Float[Tensor, "B E"]:
        """Token ids of the tokenizer to embeddings."""
        mask = text != PADDING
        tokens = Tokens(text.masked_fill(~mask, self._pad_id), mask)
        features = self.encoder.text_head(self.encoder.text.pooled(tokens)).float()
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self, image: Float[Tensor, "B 3 height width"], text: Int[Tensor, "C N"]
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, "C E"], Float[Tensor, ""]]:
        """Normalised embeddings of both sides, and the logit scale (not its logarithm)."""
        return self.encode_image(image, normalize=True), self.encode_text(text, normalize=True), self.logit_scale.exp()


class OpenClipTokenizer:
    """Strings to token ids, each row padded with ``PADDING`` to the longest of the call."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    @property
    def context_length(self) -> int:
        """Maximum sequence length, special tokens included."""
        return self.tokenizer.max_tokens

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Int[Tensor, "n N"]:
        """``context_length``: pad to this length; ``UserError`` where a text is longer, which is truncated by the run's
        ``text.max_tokens``."""
        tokens = self.tokenizer([texts] if isinstance(texts, str) else list(texts))
        ids = tokens.ids.masked_fill(~tokens.mask, PADDING)
        if context_length is None:
            return ids
        if ids.shape[1] > context_length:
            raise UserError(
                f"context_length = {context_length}: a text has {ids.shape[1]} tokens; leave context_length out, or "
                f"choose {self.context_length}, the text.max_tokens of the run"
            )
        return F.pad(ids, (0, context_length - ids.shape[1]), value=PADDING)


class OpenClipParts(NamedTuple):
    """What ``open_clip.create_model_from_pretrained`` and ``open_clip.get_tokenizer`` return, together."""

    model: OpenClipModel
    preprocess: ImageTransform
    tokenizer: OpenClipTokenizer


def as_open_clip(run: str | Path, *, device: str = "cpu") -> OpenClipParts:
    """The model of a run with open_clip's interface, in float32 and evaluation mode. Raises ``UserError``."""
    model = load(run, device=device, precision="float32")
    assert isinstance(model.encoder, DualEncoder)
    parts = OpenClipModel(model.encoder, model.tokenizer.pad_id).to(torch.device(device))
    return OpenClipParts(parts, model.transform, OpenClipTokenizer(model.tokenizer))
