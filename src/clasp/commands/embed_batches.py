"""A callable that embeds batches of images, for Ray Data's ``map_batches``, Daft's class UDFs and the like.

Input: a dictionary of columns, one of them encoded images. Output: the same with the columns ``embedding`` and
``error``. Note: it depends on no such engine; the model is loaded when the object is made, once in each worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clasp.config.build import load
from clasp.data.images import ImageError
from clasp.types import UserError


class BatchEmbedder:
    """``BatchEmbedder("runs/photos")(batch)``: embeddings of a batch's images, with the model of a run.

    With Ray: ``data.map_batches(clasp.BatchEmbedder, fn_constructor_args=["runs/photos"], concurrency=4)``.
    """

    def __init__(self, run: str | Path, column: str = "bytes") -> None:
        self.column = column
        self.model = load(run)
        self._width = self.model.encode_image([]).shape[1]

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """``embedding`` (``float32 [n E]``, unit length) and ``error`` (empty, or why an image cannot be read; its
        embedding is NaN). Images are encoded bytes or paths. ``UserError`` if the column is missing."""
        if self.column not in batch:
            raise UserError(f"the batch has no column {self.column!r}; there are {', '.join(batch)}")
        images = list(batch[self.column])
        errors, readable, pixels = [""] * len(images), [], []
        for place, image in enumerate(images):
            try:
                pixels.append(self.model.transform(image))
                readable.append(place)
            except (ImageError, OSError) as error:
                errors[place] = " ".join(str(error).split()) or type(error).__name__
        embeddings = np.full((len(images), self._width), np.nan, np.float32)
        if pixels:
            embeddings[readable] = self.model.encode_pixels(torch.stack(pixels)).numpy()
        return {**batch, "embedding": embeddings, "error": np.array(errors, dtype=object)}
