"""Files and strings to unit vectors: an encoder with the transform and the tokenizer that belong to it.

``EmbeddingModel`` joins an ``Encoder`` to the image transform and the tokenizer of its towers, so that whoever asks for
an embedding cannot use the wrong ones. In go paths, bytes, pictures or strings, out come rows in the same order.
Note: wrong arguments are named before anything is encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clasp.data.device import to_device
from clasp.data.formats.rows import require_unicode, shorten
from clasp.data.formats.skipped_files import escape_name
from clasp.data.images import IMAGE_FORMS, ImageError, ImageTransform, is_image_form
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

    def encode_image(
        self, images: Sequence[Any] | Any, *, progress: ProgressCallback = no_progress
    ) -> Float[Tensor, "n E"]:
        """Paths, encoded bytes or PIL images to unit vectors, as many at once as suit the machine.

        Raises ``UserError`` naming the image that cannot be read, the argument that is none, and what is no list.
        """
        images = _require_list(images, "encode_image", "images")
        for place, image in enumerate(images):
            if not is_image_form(image):
                wrong = f"encode_image: image {place} is {_describe(image)}"
                raise UserError(f"{wrong}; it takes {IMAGE_FORMS}{_hint(image)}")
        if not images:
            side = self.transform.size
            return self.encode_pixels(torch.zeros(1, 3, side, side))[:0]
        rows, few = [], inference_batch_size(self.transform.size, self.device)
        for start in range(0, len(images), few):
            part = [self._pixels(image, start + place) for place, image in enumerate(images[start : start + few])]
            rows.append(self.encode_pixels(torch.stack(part)))
            progress(start + len(part), len(images))
        return torch.cat(rows)

    def encode_pixels(self, pixels: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n E"]:
        """Images that ``transform`` has read to unit vectors, as many at once as suit the machine."""
        few = inference_batch_size(self.transform.size, self.device)
        with torch.inference_mode():
            parts = (to_device(Pixels(part), self.device) for part in pixels.split(few))
            return torch.cat([self.encoder.embed_image(part).cpu() for part in parts])

    def encode_text(
        self, texts: Sequence[str] | Any, *, tokens_per_batch: int = 4096, progress: ProgressCallback = no_progress
    ) -> Float[Tensor, "n E"]:
        """Strings to unit vectors; sorted by length inside, so that short ones are never padded to long ones.

        ``tokens_per_batch``: how many of them go through the tower at once.

        Raises ``UserError`` naming the argument that is no string or not valid Unicode, and for what is no list.
        """
        texts = _require_list(texts, "encode_text", "strings")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"encode_text: text {place} is {_describe(text)}; it takes strings")
            require_unicode(text, f"encode_text: text {place}")
        if not texts:
            return self.encode_text(["a"])[:0]
        rows: dict[int, Tensor] = {}
        with torch.inference_mode():
            for indices, part in iter_text_batches(texts, self.tokenizer, tokens_per_batch):
                embedded = self.encoder.embed_text(to_device(part, self.device)).cpu()
                rows.update(zip(indices, embedded, strict=True))
                progress(len(rows), len(texts))
        return torch.stack([rows[i] for i in range(len(texts))])

    def similarity(self, images: Float[Tensor, "n E"] | Any, texts: Float[Tensor, "m E"] | Any) -> Float[Tensor, "n m"]:
        """Cosines of every image with every text. Raises ``UserError`` for what is no embeddings of one width."""
        for name, given in (("images", images), ("texts", texts)):
            if not isinstance(given, Tensor) or given.ndim != 2:
                raise UserError(f"similarity: {name} is {_describe(given)}; it takes embeddings of images and of texts")
        if images.shape[1] != texts.shape[1]:
            raise UserError(f"similarity: images are {images.shape[1]} wide and texts {texts.shape[1]}")
        return images @ texts.T

    def _pixels(self, image: Any, position: int) -> Tensor:
        try:
            return self.transform(image)
        except (ImageError, OSError) as error:
            name = escape_name(str(image)) if isinstance(image, str | Path) else f"image {position}"
            raise UserError(f"{name}: {error}") from None


def _require_list(given: Any, function: str, what: str) -> list[Any]:
    """An argument that is to be a list, as one; ``UserError`` for one thing alone, and for what has no order."""
    numbers = isinstance(given, Tensor) or (isinstance(given, np.ndarray) and given.dtype.kind not in "OU")
    alone = is_image_form(given) or isinstance(given, Mapping | AbstractSet) or not isinstance(given, Iterable)
    if numbers or alone:
        single = "" if numbers else " alone"
        raise UserError(f"{function} takes a list of {what}, not {_describe(given)}{single}{_hint(given)}")
    return list(given)


def _hint(value: Any) -> str:
    if not isinstance(value, np.ndarray | Tensor):
        return ""
    return "; PIL.Image.fromarray makes an image of an array, and encode_pixels takes what the transform made"


def _describe(value: Any) -> str:
    """A wrong argument in a few words: what it is, and how large."""
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    if isinstance(value, np.ndarray | Tensor):
        return f"an array ({kind} of shape {tuple(value.shape)}, {value.dtype})"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return shorten(value) if value is None or isinstance(value, str) else f"of type {kind}: {shorten(value)}"
