"""An encoder whose towers compute in the precision of its recipe: the encoder of evaluations.

Input: an ``Encoder`` and what each side of it computes in. Output: an ``Encoder`` with the embeddings of
``EmbeddingModel``. Note: pooled features of the cache, which have their precision already, pass through the head in
float32; gradients are not meant to.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from clasp.models.inference import EncoderPrecision
from clasp.models.precision import computing_in
from clasp.plain_types import Precision
from clasp.types import Encoder, ImageInput, Pixels, PooledFeatures, TextInput, Tokens


@dataclass(frozen=True, slots=True)
class EncoderInPrecision:
    """``encoder``, with live towers and blocks over cached hidden states in ``precision``."""

    encoder: Encoder
    precision: EncoderPrecision

    @property
    def name(self) -> str:
        """That of the encoder."""
        return self.encoder.name

    @property
    def fingerprint(self) -> str:
        """That of the encoder, whatever it computes in."""
        return self.encoder.fingerprint

    def embed_image(self, inputs: ImageInput) -> Float[Tensor, "B E"]:
        """As ``encode_image``, also from cached features."""
        with _computing(inputs, self.precision.image):
            return self.encoder.embed_image(inputs)

    def embed_text(self, inputs: TextInput) -> Float[Tensor, "B E"]:
        """As ``encode_text``, also from cached features."""
        with _computing(inputs, self.precision.text):
            return self.encoder.embed_text(inputs)

    def encode_image(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E"]:
        """Normalised pixels to L2-normalised embeddings."""
        return self.embed_image(Pixels(pixels))

    def encode_text(self, tokens: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B E"]:
        """Token ids to L2-normalised embeddings; ``mask``: the attention mask, true on real tokens."""
        return self.embed_text(Tokens(tokens, mask))


def _computing(inputs: ImageInput | TextInput, tower: Precision) -> AbstractContextManager[object]:
    """The context for these inputs of a tower that computes in ``tower``."""
    if isinstance(inputs, PooledFeatures):
        return nullcontext()
    return computing_in(tower, (inputs.ids if isinstance(inputs, Tokens) else inputs.values).device)
