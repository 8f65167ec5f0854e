"""Files and strings to unit vectors: an encoder with the eyes and ears that belong to it.

``EmbeddingModel`` joins an ``Encoder`` to the image transform and the tokenizer of its towers, so that whoever asks for
an embedding cannot use the wrong ones. In go paths, bytes, pictures or strings, out come rows in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.data.device import to_device
from clasp.data.images import ImageError, ImageTransform
from clasp.data.loader import inference_batch_size, iter_text_batches
from clasp.data.tokenizer import Tokenizer
from clasp.types import Encoder, Pixels, ProgressCallback, UserError


def no_progress(done: int, total: int) -> None:
    """Nobody is watching."""


class EmbeddingModel:
    """An aligned model, ready to use: what ``clasp.load`` returns."""

    def __init__(self, encoder: Encoder, transform: ImageTransform, tokenizer: Tokenizer, *, device: str = "cpu"):
        self.encoder = encoder
        self.transform = transform
        self.tokenizer = tokenizer
        self.device = torch.device(device)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that an embedding depends on."""
        return ":".join((self.encoder.fingerprint, self.transform.fingerprint, self.tokenizer.fingerprint))

    def encode_image(self, images: Sequence[Any], *, progress: ProgressCallback = no_progress) -> Float[Tensor, "n E"]:
        """Paths, encoded bytes or PIL pictures to unit vectors, as many at once as suit the machine.

        Raises ``UserError`` naming the image that cannot be read, and for one image that is not in a list.
        """
        if isinstance(images, str | bytes | Path):
            what = "bytes" if isinstance(images, bytes) else repr(str(images))
            raise UserError(f"encode_image takes a list of images, not {what} alone")
        rows, few = [], inference_batch_size(self.transform.size, self.device)
        for start in range(0, len(images), few):
            part = [self._pixels(image, start + place) for place, image in enumerate(images[start : start + few])]
            rows.append(self.encode_pixels(torch.stack(part)))
            progress(start + len(part), len(images))
        return torch.cat(rows) if rows else torch.empty(0, 0)

    def encode_pixels(self, pixels: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n E"]:
        """Images that ``transform`` has read to unit vectors, as many at once as suit the machine."""
        few = inference_batch_size(self.transform.size, self.device)
        with torch.inference_mode():
            parts = (to_device(Pixels(part), self.device) for part in pixels.split(few))
            return torch.cat([self.encoder.embed_image(part).cpu() for part in parts])

    def encode_text(
        self, texts: Sequence[str], *, tokens_per_batch: int = 4096, progress: ProgressCallback = no_progress
    ) -> Float[Tensor, "n E"]:
        """Strings to unit vectors; sorted by length inside, so that short ones are never padded to long ones.

        ``tokens_per_batch``: how many of them go through the tower at once.

        Raises ``UserError`` for one string that is not in a list.
        """
        if isinstance(texts, str):
            raise UserError(f"encode_text takes a list of strings, not the string {texts!r}")
        rows: dict[int, Tensor] = {}
        with torch.inference_mode():
            for indices, part in iter_text_batches(texts, self.tokenizer, tokens_per_batch):
                embedded = self.encoder.embed_text(to_device(part, self.device)).cpu()
                rows.update(zip(indices, embedded, strict=True))
                progress(len(rows), len(texts))
        return torch.stack([rows[i] for i in range(len(texts))]) if rows else torch.empty(0, 0)

    def similarity(self, images: Float[Tensor, "n E"], texts: Float[Tensor, "m E"]) -> Float[Tensor, "n m"]:
        """Cosines of every image with every text."""
        return images @ texts.T

    def _pixels(self, image: Any, position: int) -> Tensor:
        try:
            return self.transform(image)
        except (ImageError, OSError) as error:
            name = image if isinstance(image, str | Path) else f"image {position}"
            raise UserError(f"{name}: {error}") from None
