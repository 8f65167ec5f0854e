"""An exported model at work without torch: image files and strings to L2-normalised embeddings by onnxruntime.

Input: a folder written by ``clasp export RUN --to onnx``. Output: embeddings ``[n E]`` as numpy arrays; a
``SearchModel``. Note: of other packages numpy, onnxruntime, tokenizers, Pillow and jaxtyping are imported, no torch;
images and captions are preprocessed by the same code as in training (``data.decoding``, ``data.caption_ids``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tokenizers
from jaxtyping import Float

from clasp.data.caption_ids import BACKEND_FILE, SETTINGS_FILE, CaptionIds, TokenizerSettings
from clasp.data.decoding import (
    IMAGE_FORMS,
    ImageError,
    ResizeSettings,
    decode_resized,
    is_image_form,
    normalise_picture,
)
from clasp.data.formats.rows import require_unicode
from clasp.errors import UserError

MANIFEST_FILE = "clasp_onnx.json"
ONNX_FORMAT = 1
WeightFormat = Literal["float32", "int8"]

_TOKENS_PER_BATCH, _PIXELS_PER_BATCH = 4096, 300_000  # of one forward pass, as in clasp.models.inference on a CPU


@dataclass(frozen=True, slots=True)
class OnnxTransform:
    """The preprocessing of the image graph, bitwise that of the exported run (``clasp.data.images.ImageTransform``)."""

    resizing: ResizeSettings
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def size(self) -> int:
        """Side of the square output, pixels."""
        return self.resizing.size

    def __call__(self, image: Any) -> Float[np.ndarray, "3 height width"]:
        """The normalised image, of a path, encoded bytes or a PIL image. Raises ``ImageError``."""
        return normalise_picture(decode_resized(image, self.resizing), self.mean, self.std)


class OnnxModel:
    """A dual encoder exported to ONNX; each graph is loaded when it is first used.

    ``weights``: "int8" for the quantised graphs, where they were exported. ``threads``: of onnxruntime, by default all
    cores. Raises ``UserError`` for a folder that is no such export, or is damaged.
    """

    def __init__(self, folder: str | Path, *, weights: WeightFormat = "float32", threads: int | None = None) -> None:
        self.folder, self.weights, self._threads = Path(folder), weights, threads
        if not (self.folder / MANIFEST_FILE).is_file():
            raise UserError(f"{folder} is not an output of clasp export --to onnx: it has no {MANIFEST_FILE}")
        self.manifest = _read_manifest(self.folder / MANIFEST_FILE)
        if weights not in get_args(WeightFormat):
            raise UserError(f"weights = {weights!r} is not one of {', '.join(get_args(WeightFormat))}")
        if weights not in self.manifest["image"]["graphs"]:
            raise UserError(f"{folder} has no {weights} graphs; clasp export --to onnx --int8 writes them")
        transform = self.manifest["image"]["transform"]
        names = ("size", "resize", "interpolation", "crop_fraction")
        background = tuple(transform["background"])
        resizing = ResizeSettings(**{name: transform[name] for name in names}, background=background)
        self.transform = OnnxTransform(resizing, tuple(transform["mean"]), tuple(transform["std"]))

    @property
    def name(self) -> str:
        """Both towers, as the exported model is named, and the format of the weights unless float32."""
        towers = " + ".join(self.manifest["towers"].values())
        return towers if self.weights == "float32" else f"{towers} in {self.weights}"

    @property
    def fingerprint(self) -> str:
        """``EmbeddingModel.fingerprint`` of the exported model, and unless float32 the format of the weights and the
        scheme by which they were rounded, which an earlier clasp did not record."""
        exported = self.manifest["fingerprint"]
        if self.weights == "float32":
            return exported
        scheme = self.manifest.get("int8", {}).get("scheme")
        return f"{exported}:{self.weights}" if scheme is None else f"{exported}:{self.weights}:{scheme}"

    @property
    def logit_scale(self) -> float:
        """By what cosines are multiplied before a softmax (not its logarithm)."""
        return self.manifest["logit_scale"]

    def in_precision_of(self, fingerprint: str) -> OnnxModel:
        """The graphs that computed the embeddings of a store with this fingerprint; this model if none of them did."""
        if fingerprint not in ("", self.fingerprint):
            for weights in get_args(WeightFormat):
                if weights in self.manifest["image"]["graphs"]:
                    other = OnnxModel(self.folder, weights=weights, threads=self._threads)
                    if other.fingerprint == fingerprint:
                        return other
        return self

    def encode_image(self, images: Sequence[Any] | Any) -> Float[np.ndarray, "n E"]:
        """Paths, encoded bytes or PIL images to L2-normalised embeddings.

        Raises ``UserError`` for an element that is no image, and for one that cannot be read.
        """
        images = _as_list(images, "encode_image", "images")
        for place, image in enumerate(images):
            if not is_image_form(image):
                raise UserError(f"encode_image: image {place} is a {type(image).__name__}; it takes {IMAGE_FORMS}")
        rows = [np.zeros((0, self.manifest["width"]), np.float32)]
        for start in range(0, len(images), self._batch):
            pixels = [self._pixels(image, start + place) for place, image in enumerate(images[start:][: self._batch])]
            rows.append(self.encode_pixels(np.stack(pixels)))
        return np.concatenate(rows)

    def encode_pixels(self, pixels: Float[np.ndarray, "n 3 height width"]) -> Float[np.ndarray, "n E"]:
        """Outputs of ``transform`` to L2-normalised embeddings."""
        parts = (pixels[start : start + self._batch] for start in range(0, len(pixels), self._batch))
        return np.concatenate([self._image_graph.run(["embedding"], {"pixels": part})[0] for part in parts])

    def encode_text(self, texts: Sequence[str] | Any) -> Float[np.ndarray, "n E"]:
        """Strings to L2-normalised embeddings; batches are sorted by length. Raises ``UserError``."""
        texts = _as_list(texts, "encode_text", "strings")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"encode_text: text {place} is a {type(text).__name__}; it takes strings")
            require_unicode(text, f"encode_text: text {place}")
        ids = self._caption_ids(texts)
        for text, row in zip(texts, ids, strict=True):
            if not row:
                raise UserError(f"the caption {text!r} has no token")
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        out = np.zeros((len(ids), self.manifest["width"]), np.float32)
        start = 0
        while start < len(order):
            places = order[start : start + max(1, _TOKENS_PER_BATCH // len(ids[order[start]]))]
            padded, mask = self._caption_ids.pad([ids[place] for place in places])
            out[places] = self._text_graph.run(["embedding"], {"ids": padded, "mask": mask})[0]
            start += len(places)
        return out

    def similarity(self, images: Float[np.ndarray, "n E"], texts: Float[np.ndarray, "m E"]) -> Float[np.ndarray, "n m"]:
        """Cosine similarity of every image with every text."""
        return images @ texts.T

    @property
    def _batch(self) -> int:
        return max(1, _PIXELS_PER_BATCH // self.transform.size**2)

    def _pixels(self, image: Any, position: int) -> Float[np.ndarray, "3 height width"]:
        try:
            return self.transform(image)
        except ImageError as error:
            place = "" if isinstance(image, str | Path) else f"image {position}: "  # an error names a path
            raise UserError(f"{place}{error}") from None

    @cached_property
    def _caption_ids(self) -> CaptionIds:
        folder = self.folder / "tokenizer"
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        return CaptionIds(tokenizers.Tokenizer.from_file(str(folder / BACKEND_FILE)), TokenizerSettings(**settings))

    @cached_property
    def _image_graph(self) -> Any:
        return self._session(self.manifest["image"]["graphs"][self.weights])

    @cached_property
    def _text_graph(self) -> Any:
        return self._session(self.manifest["text"]["graphs"][self.weights])

    def _session(self, file: str) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        path = self.folder / file
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class for each of its status codes, all but undocumented
            raise UserError(f"{path} cannot be loaded: {' '.join(str(error).split())}; export the run again") from None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != ONNX_FORMAT:
            raise UserError(f"{path} is of format {manifest['format']}; this clasp reads {ONNX_FORMAT}")
        missing = [key for key in ("towers", "fingerprint", "width", "image", "text") if key not in manifest]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}; export the run again") from None
    if missing:
        raise UserError(f"{path} is damaged: it lacks {missing[0]!r}; export the run again")
    return manifest


def _as_list(given: Any, function: str, what: str) -> list[Any]:
    if not isinstance(given, list | tuple):
        raise UserError(f"{function} takes a list of {what}, not a {type(given).__name__}")
    return list(given)
