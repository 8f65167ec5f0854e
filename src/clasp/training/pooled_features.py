"""Pooled features of both towers for chosen training pairs, cached or computed.

Input: the readers of both sides and pair numbers. Output: aligned features, or each image once with its captions. Note:
unreadable images are counted and left out with their captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.data.device import to_device
from clasp.data.feature_cache.replay import CachedImageReader, CachedTextReader
from clasp.data.loader import BadSampleLimit, BatchReader
from clasp.data.readers import PairIndex, SampleIndices
from clasp.models.dual_encoder import DualEncoder
from clasp.models.tower import Tower
from clasp.types import ImageInput, PooledFeatures, TextInput

_PAIRS_AT_ONCE, _PAIRS_IN_A_READ = 4096, 256


@dataclass(frozen=True, slots=True)
class ImagesWithCaptions:
    """Images with all of their captions: ``counts`` of them, and ``captions`` in parts, each with the row of its image;
    they are read while they are iterated."""

    images: Float[Tensor, "m Di"]
    counts: Int[np.ndarray, " m"]
    captions: Iterator[tuple[Int[Tensor, " k"], Float[Tensor, "k Dt"]]]


class PairFeatures:
    """Pooled features of both towers for chosen pairs."""

    def __init__(self, model: DualEncoder, sides: BatchReader, index: PairIndex, tally: BadSampleLimit):
        self.model, self.sides, self.index, self.tally = model, sides, index, tally

    @property
    def cached(self) -> bool:
        """Whether both sides are cached pooled features of wholly frozen towers."""
        image, text = self.sides.image, self.sides.text
        return (isinstance(image, CachedImageReader) and image.features.pooled) and (
            isinstance(text, CachedTextReader) and text.features.pooled
        )

    def every_image(self, pairs: Int[np.ndarray, " n"]) -> Iterator[ImagesWithCaptions]:
        """Each pair that can be read once, with all of its captions: an image is read once, whatever their number."""
        for part in np.array_split(pairs, -(-len(pairs) // _PAIRS_AT_ONCE)):
            kept, images = self._images(part)
            if len(kept):
                counts = self.index.caption_offsets[kept + 1] - self.index.caption_offsets[kept]
                yield ImagesWithCaptions(images, counts, self._captions(kept, counts))

    def rows(self, numbers: Int[np.ndarray, " n"], draw: int) -> tuple[Float[Tensor, "m Di"], Float[Tensor, "m Dt"]]:
        """Aligned features of those of the pairs that can be read, each with its caption number ``draw``."""
        kept, images = self._images(numbers)
        return images, self._texts(kept, np.full(len(kept), draw))

    def _images(self, numbers: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " m"], Float[Tensor, "m Di"]]:
        """Those of the pairs whose images can be read, and the features of these."""
        kept, images = [numbers[:0]], [self._none(self.model.image)]
        for part in _in_reads(numbers):
            picks = SampleIndices(part, np.zeros(len(part), np.int64), np.zeros(len(part), np.int64))
            read = self.sides.image(picks, self.index.__getitem__)
            self.tally.add(read.skipped)
            if read.kept:
                kept.append(part[read.kept])
                images.append(pool_inputs(self.model.image, read.inputs))
        return np.concatenate(kept), torch.cat(images[1:] or images)

    def _texts(self, numbers: Int[np.ndarray, " m"], draws: Int[np.ndarray, " m"]) -> Float[Tensor, "m Dt"]:
        texts = [self._none(self.model.text)]
        for rows in _in_reads(np.arange(len(numbers))):
            picks = SampleIndices(numbers[rows], draws[rows], np.zeros(len(rows), np.int64))
            texts.append(pool_inputs(self.model.text, self.sides.text(picks, self.index.__getitem__).inputs))
        return torch.cat(texts[1:] or texts)

    def _captions(
        self, numbers: Int[np.ndarray, " m"], counts: Int[np.ndarray, " m"]
    ) -> Iterator[tuple[Int[Tensor, " k"], Float[Tensor, "k Dt"]]]:
        """All captions of these pairs, the first of each, then the second, and so on, in full parts."""
        rows = np.repeat(np.arange(len(numbers)), counts)
        draws = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.argsort(draws, kind="stable")
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            part = order[start : start + _PAIRS_AT_ONCE]
            yield torch.from_numpy(rows[part]), self._texts(numbers[rows[part]], draws[part])

    def _none(self, tower: Tower) -> Float[Tensor, "0 D"]:
        return torch.empty(0, tower.width, device=next(self.model.parameters()).device)


def _in_reads(numbers: Int[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " m"]]:
    for start in range(0, len(numbers), _PAIRS_IN_A_READ):
        yield numbers[start : start + _PAIRS_IN_A_READ]


@torch.no_grad()
def pool_inputs(tower: Tower, inputs: ImageInput | TextInput) -> Float[Tensor, "B D"]:
    """The pooled features of a tower, which ``inputs`` may be already."""
    moved = to_device(inputs, next(tower.parameters()).device)
    return moved.values if isinstance(moved, PooledFeatures) else tower.pooled(moved)
