"""Pooled features of both towers for chosen training pairs, cached or computed.

Input: the readers of both sides and pair numbers. Output: aligned features, each caption once with its image. Note:
unreadable images are counted and left out with their captions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.data.device import to_device
from clasp.data.feature_cache.replay import CachedImageReader, CachedTextReader
from clasp.data.loader import BadSampleLimit, BatchReader
from clasp.data.readers import PairIndex, SampleIndices
from clasp.models.dual_encoder import DualEncoder
from clasp.models.precision import Precision, computing_in, frozen_precision
from clasp.models.tower import Tower
from clasp.types import ImageInput, PooledFeatures, TextInput

_PART = 256  # pairs whose inputs are in memory at a time


class PairFeatures:
    """Pooled features of both towers for chosen pairs; ``precision``: of those that are not cached."""

    def __init__(
        self,
        model: DualEncoder,
        sides: BatchReader,
        index: PairIndex,
        tally: BadSampleLimit,
        precision: Precision = "float32",
    ):
        self.model, self.sides, self.index, self.tally = model, sides, index, tally
        self.precision: Precision = precision

    @property
    def cached(self) -> bool:
        """Whether both sides are cached pooled features of wholly frozen towers."""
        image, text = self.sides.image, self.sides.text
        return (isinstance(image, CachedImageReader) and image.features.pooled) and (
            isinstance(text, CachedTextReader) and text.features.pooled
        )

    def every_caption(
        self, pairs: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Float[Tensor, "m Di"], Float[Tensor, "m Dt"]]]:
        """Each caption of these pairs once, with its image. An image that is not cached is computed once."""
        captions = np.diff(self.index.caption_offsets)[pairs]
        if not self.cached and captions.max() > 1:
            yield from self._every_caption_of_parts(pairs, captions)
            return
        for draw in range(int(captions.max())):
            numbers = pairs[captions > draw]
            for part in np.array_split(numbers, -(-len(numbers) // 4096)):
                yield self.rows(part, draw)

    def _every_caption_of_parts(
        self, pairs: Int[np.ndarray, " n"], captions: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Float[Tensor, "m Di"], Float[Tensor, "m Dt"]]]:
        """The same, one part of the pairs after the other, so that its images are in memory."""
        for start in range(0, len(pairs), _PART):
            part, counts = pairs[start : start + _PART], captions[start : start + _PART]
            read = self.sides.image(_caption_of_each(part, 0), self.index.__getitem__)
            self.tally.add(read.skipped)
            if not read.kept:
                continue
            images = pool_inputs(self.model.image, read.inputs, self.precision)
            part, counts = part[read.kept], counts[read.kept]
            for draw in range(int(counts.max())):
                some = np.flatnonzero(counts > draw)
                texts = self.sides.text(_caption_of_each(part[some], draw), self.index.__getitem__).inputs
                yield images[some.tolist()], pool_inputs(self.model.text, texts, self.precision)

    def rows(self, numbers: Int[np.ndarray, " n"], draw: int) -> tuple[Float[Tensor, "m Di"], Float[Tensor, "m Dt"]]:
        """Aligned features of those of the pairs that can be read, each with its caption number ``draw``."""
        images, texts = [], []
        for start in range(0, len(numbers), _PART):
            picks = _caption_of_each(numbers[start : start + _PART], draw)
            read = self.sides.image(picks, self.index.__getitem__)
            self.tally.add(read.skipped)
            if read.kept:
                images.append(pool_inputs(self.model.image, read.inputs, self.precision))
                text = self.sides.text(picks[read.kept], self.index.__getitem__).inputs
                texts.append(pool_inputs(self.model.text, text, self.precision))
        if not images:
            device = next(self.model.parameters()).device
            image, text = self.model.image, self.model.text
            return torch.empty(0, image.width, device=device), torch.empty(0, text.width, device=device)
        return torch.cat(images), torch.cat(texts)


def _caption_of_each(pairs: Int[np.ndarray, " n"], draw: int) -> SampleIndices:
    """Caption number ``draw`` of each pair, with its image without augmentation."""
    return SampleIndices(pairs, np.full(len(pairs), draw), np.zeros(len(pairs), dtype=np.int64))


@torch.no_grad()
def pool_inputs(tower: Tower, inputs: ImageInput | TextInput, precision: Precision = "float32") -> Float[Tensor, "B D"]:
    """The pooled features of a tower, which ``inputs`` may be already; else computed in ``precision`` (convolutional
    towers in float32)."""
    device = next(tower.parameters()).device
    moved = to_device(inputs, device)
    if isinstance(moved, PooledFeatures):
        return moved.values
    with computing_in(frozen_precision(precision, convolutional=tower.convolutional), device):
        return tower.pooled(moved).float()
