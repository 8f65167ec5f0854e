"""Embeddings that were computed elsewhere, as a model for evaluation: a folder with ``image.npy`` and ``text.npy``.

Input: ``image.npy`` [n E] with ``image.json``, the id of the pair of each row, and ``text.npy`` [m E] with
``text.json``, the text of each row (captions, and the prompts of zero-shot classification); both JSON files are lists.
Output: ``EmbeddingFolder``, the inputs of an evaluation, and ``StoredEncoder``, which makes rows unit length. Note:
arrays are memory-mapped and read in chunks; rows are identified by id and text, never by position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clasp.data.pairs import Pairs
from clasp.evaluation.embedding_table import ImageBatches, TextBatches
from clasp.evaluation.name_checks import quote_first, refuse_repeats
from clasp.types import ImageInput, PooledFeatures, TextInput, UserError

IMAGE_ARRAY, TEXT_ARRAY = "image.npy", "text.npy"
_ROWS_AT_ONCE = 4096
_FLOATS = (np.float16, np.float32, np.float64)

_Chunks = Iterator[tuple[Sequence[str], PooledFeatures]]


class EmbeddingFolder:
    """The embeddings of a folder; an ``EvaluationInputs``.

    Raises ``UserError`` for a file that is missing or damaged, arrays that are not ``[rows E]`` of one width E, and a
    list that does not name each row once. When read: for an image or a text that has no row.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._image, self._image_rows = _read_side(folder, IMAGE_ARRAY, "ids of pairs")
        self._text, self._text_rows = _read_side(folder, TEXT_ARRAY, "texts")
        if self._image.shape[1] != self._text.shape[1]:
            raise UserError(
                f"{folder}: {IMAGE_ARRAY} is {self._image.shape[1]} wide and {TEXT_ARRAY} {self._text.shape[1]}; both "
                "must be embeddings of one space"
            )

    def images(self, pairs: Pairs) -> ImageBatches:
        """The rows of the pairs, by id."""
        ids = [pair.id for pair in pairs]
        self._require(ids, self._image_rows, IMAGE_ARRAY, f"images of {pairs.name}")
        return lambda: _chunks(ids, ids, self._image, self._image_rows)

    def texts(self, texts: Mapping[str, str]) -> TextBatches:
        """The rows of the captions, by text."""
        ids, wanted = list(texts), list(texts.values())
        self._require(wanted, self._text_rows, TEXT_ARRAY, "captions")
        return lambda: _chunks(ids, wanted, self._text, self._text_rows)

    def read(self, texts: Sequence[str]) -> _Chunks:
        """The rows of texts that are their own ids."""
        self._require(texts, self._text_rows, TEXT_ARRAY, "prompts")
        return _chunks(texts, texts, self._text, self._text_rows)

    def precompute_texts(self, texts: Iterable[str]) -> None:
        """Nothing: every text has its row already."""

    @property
    def fingerprint(self) -> str:
        """Hash of both arrays and what their rows are."""
        digest = hashlib.sha256()
        for array, rows in ((self._image, self._image_rows), (self._text, self._text_rows)):
            digest.update(repr((array.shape, array.dtype.str, list(rows))).encode("utf-8", "surrogatepass"))
            for start in range(0, len(array), _ROWS_AT_ONCE):
                digest.update(np.ascontiguousarray(array[start : start + _ROWS_AT_ONCE]).tobytes())
        return digest.hexdigest()

    def _require(self, keys: Sequence[str], rows: Mapping[str, int], file: str, what: str) -> None:
        missing = [key for key in keys if key not in rows]
        if missing:
            names = Path(file).with_suffix(".json")
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(keys)} {what} have no row in {file}; {names} does not list "
                f"{quote_first(missing, 3)}"
            )


class StoredEncoder:
    """An ``Encoder`` of embeddings that are there already; it cannot read pixels or tokens."""

    def __init__(self, inputs: EmbeddingFolder, name: str):
        self.name, self.fingerprint = name, inputs.fingerprint

    def embed_image(self, inputs: ImageInput) -> Float[Tensor, "B E"]:
        assert isinstance(inputs, PooledFeatures), f"{self.name} holds embeddings, and no tower"
        return F.normalize(inputs.values, dim=1)

    def embed_text(self, inputs: TextInput) -> Float[Tensor, "B E"]:
        assert isinstance(inputs, PooledFeatures), f"{self.name} holds embeddings, and no tower"
        return F.normalize(inputs.values, dim=1)

    def encode_image(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E"]:
        raise UserError(f"{self.name} holds embeddings, and has no tower to run images through")

    def encode_text(self, tokens: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B E"]:
        raise UserError(f"{self.name} holds embeddings, and has no tower to run texts through")


def _chunks(ids: Sequence[str], keys: Sequence[str], array: np.ndarray, rows: Mapping[str, int]) -> _Chunks:
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        values = array[[rows[key] for key in keys[some]]].astype(np.float32)
        yield ids[some], PooledFeatures(torch.from_numpy(values))


def _read_side(folder: Path, file: str, what: str) -> tuple[np.ndarray, dict[str, int]]:
    """An array, and the row of each name in its list."""
    path, names = folder / file, (folder / file).with_suffix(".json")
    try:
        with path.open("rb") as opened:  # numpy leaves a file open that is none of its own
            if opened.read(6) != b"\x93NUMPY":
                raise ValueError("it does not begin as a .npy file")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        listed = json.loads(names.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {Path(error.filename).name}; {file} needs a list of its {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: {file} or {names.name} cannot be read: {reason}") from None
    if array.ndim != 2 or array.dtype not in _FLOATS or not len(array):
        raise UserError(f"{path} must be an array [rows E] of float16, float32 or float64; it is {array.shape}")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise UserError(f"{names} must be a JSON list of strings, the {what}")
    if len(listed) != len(array):
        raise UserError(f"{names} lists {len(listed)} {what} for the {len(array)} rows of {file}")
    refuse_repeats(listed, str(names))
    return array, {name: row for row, name in enumerate(listed)}
