"""Inference: image files and strings to L2-normalised embeddings.

``EmbeddingModel`` bundles an ``Encoder`` with the image transform and the tokenizer of its towers, so that inputs are
always preprocessed as the encoder needs. Input: paths, bytes, PIL images or strings. Output: embeddings ``[n E]``, in
the order of the input. Note: invalid arguments raise before anything is encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clasp.data.device import to_device
from clasp.data.formats.rows import require_unicode, shorten
from clasp.data.images import IMAGE_FORMS, ImageError, ImageTransform, is_image_form, load_opened
from clasp.data.loader import inference_batch_size, iter_text_batches
from clasp.data.read_ahead import DECODE_THREADS, available_cores, read_ahead
from clasp.data.tokenizer import Tokenizer
from clasp.models.packed_weights import packed_weights
from clasp.models.precision import computing_in
from clasp.plain_types import Precision
from clasp.types import Encoder, Pixels, ProgressCallback, UserError, no_progress

_FEWEST_TOKENS = 2  # of a text: its first and its last, or one and the prefix


class EncoderPrecision(NamedTuple):
    """What each side of an encoder computes in; embeddings are float32 in either."""

    image: Precision = "float32"
    text: Precision = "float32"


@runtime_checkable
class DividesImages(Protocol):
    """An encoder that encodes several parts of a batch of images side by side, in bfloat16."""

    @property
    def image_parts(self) -> int: ...


class EmbeddingModel:
    """An aligned dual encoder with its preprocessing, as ``clasp.load`` returns it."""

    def __init__(
        self,
        encoder: Encoder,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        *,
        device: str = "cpu",
        precision: EncoderPrecision | None = None,
    ):
        self.encoder = encoder
        self.transform = transform
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.precision = precision or EncoderPrecision()

    @property
    def name(self) -> str:
        """That of the encoder."""
        return self.encoder.name

    @property
    def fingerprint(self) -> str:
        """Hash of all that an embedding in a store depends on: encoder, image transform and tokenizer, and the
        precision of images unless it is float32. That of texts is not part of it: a query has a cosine of 0.9999 with
        itself in float32, and may be compared with images in either precision."""
        parts = (self.encoder.fingerprint, self.transform.fingerprint, self.tokenizer.fingerprint)
        return ":".join(parts if self.precision.image == "float32" else (*parts, self.precision.image))

    def in_precision_of(self, fingerprint: str) -> EmbeddingModel:
        """The same model with images in the precision of a store with this fingerprint, so that a store is never in two
        precisions, on whatever machine it was made. This model where they differ in more, or the store is empty."""
        if not fingerprint:
            return self
        for image in get_args(Precision):
            precision = self.precision._replace(image=image)
            other = EmbeddingModel(
                self.encoder, self.transform, self.tokenizer, device=str(self.device), precision=precision
            )
            if other.fingerprint == fingerprint:
                return other
        return self

    def encode_image(
        self, images: Sequence[Any] | Any, *, progress: ProgressCallback = no_progress
    ) -> Float[Tensor, "n E"]:
        """Paths, encoded bytes or PIL images to L2-normalised embeddings; the batch size is chosen by device.

        Raises ``UserError`` for an image that cannot be read, an element that is no image, and an argument that is no
        list.
        """
        images = _require_list(images, "encode_image", "images")
        for place, image in enumerate(images):
            if not is_image_form(image):
                wrong = f"encode_image: image {place} is {_describe(image)}"
                raise UserError(f"{wrong}; it takes {IMAGE_FORMS}{_hint(image)}")
        for place, image in enumerate(images):
            try:
                load_opened(image)  # here, since the threads below may get one image twice
            except ImageError as error:
                raise UserError(f"image {place}: {error}") from None
        if not images:
            side = self.transform.size
            return self.encode_pixels(torch.zeros(1, 3, side, side))[:0]
        rows, done = [], 0
        batch_size = self._image_batch_size
        reading = read_ahead(list(enumerate(images)), self._pixels, batch=batch_size, ahead=self._ahead)
        with packed_weights(at_once=len(images) > batch_size), closing(reading) as batches:
            for batch in batches:
                rows.append(self.encode_pixels(torch.stack(batch)))
                progress(done := done + len(batch), len(images))
        return torch.cat(rows)

    def encode_pixels(
        self, pixels: Float[Tensor, "n 3 height width"] | Float[np.ndarray, "n 3 height width"]
    ) -> Float[Tensor, "n E"]:
        """Outputs of ``transform`` to L2-normalised embeddings; the batch size is chosen by device."""
        pixels, batch_size = torch.as_tensor(pixels), self._image_batch_size
        several = packed_weights(at_once=len(pixels) > batch_size)
        with torch.inference_mode(), several, computing_in(self.precision.image, self.device):
            parts = (to_device(Pixels(part), self.device) for part in pixels.split(batch_size))
            return torch.cat([self.encoder.embed_image(part).cpu() for part in parts])

    def encode_text(
        self,
        texts: Sequence[str] | Any,
        *,
        tokens_per_batch: int | None = None,
        progress: ProgressCallback = no_progress,
    ) -> Float[Tensor, "n E"]:
        """Strings to L2-normalised embeddings; equal ones are encoded once, in batches of similar length.

        ``tokens_per_batch``: tokens in one forward pass of the tower; by default 4,096, and 2,048 in bfloat16 on a CPU,
        whose caches hold more of a layer then. An empty string has the embedding of the tokenizer's special tokens, as
        in open_clip and sentence-transformers; what asks or learns refuses it. Raises ``UserError`` for an element that
        is no string, not valid Unicode or without a token, and for an argument that is no list.
        """
        texts = _require_list(texts, "encode_text", "strings")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"encode_text: text {place} is {_describe(text)}; it takes strings")
            require_unicode(text, f"encode_text: text {place}")
        if not texts:
            return self.encode_text(["a"])[:0]
        if tokens_per_batch is None:
            tokens_per_batch = 2048 if self.precision.text == "bfloat16" and self.device.type == "cpu" else 4096
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        parts: list[Tensor] = []
        places: list[int] = []
        several = packed_weights(at_once=_FEWEST_TOKENS * len(rows) > tokens_per_batch)
        with torch.inference_mode(), several, computing_in(self.precision.text, self.device):
            for indices, part in iter_text_batches(list(rows), self.tokenizer, tokens_per_batch):
                parts.append(self.encoder.embed_text(to_device(part, self.device)).cpu())
                places += indices
                progress(len(places), len(rows))
        found = torch.cat(parts)[torch.tensor(places).argsort()]
        return found[[rows[text] for text in texts]]

    def similarity(self, images: Float[Tensor, "n E"] | Any, texts: Float[Tensor, "m E"] | Any) -> Float[Tensor, "n m"]:
        """Cosine similarity of every image with every text. Raises ``UserError`` unless both have one width."""
        for name, given in (("images", images), ("texts", texts)):
            if not isinstance(given, Tensor) or given.ndim != 2:
                raise UserError(f"similarity: {name} is {_describe(given)}; it takes embeddings of images and of texts")
        if images.shape[1] != texts.shape[1]:
            raise UserError(f"similarity: images are {images.shape[1]} wide and texts {texts.shape[1]}")
        return images @ texts.T

    @property
    def _image_batch_size(self) -> int:
        """Images in one pass, or in the passes of several threads."""
        encoder, lower = self.encoder, self.precision.image == "bfloat16"
        parts = encoder.image_parts if lower and isinstance(encoder, DividesImages) else 1
        return parts * inference_batch_size(self.transform.size, self.device)

    @property
    def _ahead(self) -> int:
        """Batches decoded while one is encoded: none where decoding would take the cores of the tower, whose threads
        wait for each other in every product (on two cores 4 to 10 % more time; on more than two not measured)."""
        return 0 if self.device.type == "cpu" and available_cores() <= DECODE_THREADS else 1

    def _pixels(self, numbered: tuple[int, Any]) -> Tensor:
        position, image = numbered
        try:
            return self.transform(image)
        except (ImageError, OSError) as error:
            place = "" if isinstance(image, str | Path) else f"image {position}: "  # an error names a path
            raise UserError(f"{place}{error}") from None


def _require_list(given: Any, function: str, what: str) -> list[Any]:
    """The argument as a list. Raises ``UserError`` for a single element, an array, and collections without order."""
    numbers = isinstance(given, Tensor) or (isinstance(given, np.ndarray) and given.dtype.kind not in "OU")
    alone = is_image_form(given) or isinstance(given, Mapping | AbstractSet) or not isinstance(given, Iterable)
    if numbers or alone:
        found, hint = _describe(given), _hint(given) if what == "images" else ""
        found = f"{found} alone" if is_image_form(given) else found.replace("of type", "a value of type", 1)
        raise UserError(f"{function} takes a list of {what}, not {found}{hint}")
    return list(given)


def _hint(value: Any) -> str:
    if not isinstance(value, np.ndarray | Tensor):
        return ""
    return "; PIL.Image.fromarray makes an image of an array, and encode_pixels takes what the transform made"


def _describe(value: Any) -> str:
    """A short description of an invalid argument: its type, and its shape, size or value."""
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    if isinstance(value, np.ndarray | Tensor):
        return f"an array ({kind} of shape {tuple(value.shape)}, {value.dtype})"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return shorten(value) if value is None or isinstance(value, str) else f"of type {kind}: {shorten(value)}"
