"""An encoder that embeds no live image twice: another task on it, or a copy of it, costs no forward pass.

Input: an encoder. Output: the same encoder, which keeps the embeddings of live images by the hash of their bytes. Note:
cached features pass through; the feature cache has them for each set of pairs (``data.feature_cache``).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clasp.types import Encoder, ImageInput, Pixels, TextInput

_KEPT = 100_000  # embeddings, 205 MB of 512 dimensions; then all are forgotten


class EncodeOnce:
    """An ``Encoder`` for the tasks of one command; its embeddings of live images are on the CPU."""

    def __init__(self, model: Encoder) -> None:
        self._model, self._kept = model, dict[int, Tensor]()

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def fingerprint(self) -> str:
        return self._model.fingerprint

    def embed_image(self, inputs: ImageInput) -> Float[Tensor, "B E"]:
        if not isinstance(inputs, Pixels) or inputs.contents is None:
            return self._model.embed_image(inputs)
        distinct = dict.fromkeys(inputs.contents)
        found = {content: self._kept[content] for content in distinct if content in self._kept}
        if new := [content for content in distinct if content not in found]:
            embedded = self._model.embed_image(inputs.select(new))
            found.update(zip(new, embedded.float().cpu(), strict=True))
        if len(self._kept) > _KEPT:
            self._kept.clear()
        self._kept |= found
        return torch.stack([found[content] for content in inputs.contents])

    def embed_text(self, inputs: TextInput) -> Float[Tensor, "B E"]:
        return self._model.embed_text(inputs)

    def encode_image(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E"]:
        return self._model.encode_image(pixels)

    def encode_text(self, tokens: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B E"]:
        return self._model.encode_text(tokens, mask)
