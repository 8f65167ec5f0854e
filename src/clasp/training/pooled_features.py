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
from clasp.models.tower import Tower
from clasp.types import ImageInput, PooledFeatures, TextInput


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

    def every_caption(
        self, pairs: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Float[Tensor, "m Di"], Float[Tensor, "m Dt"]]]:
        """Each caption of these pairs once, with its image."""
        captions = np.diff(self.index.caption_offsets)[pairs]
        for draw in range(int(captions.max())):
            numbers = pairs[captions > draw]
            for part in np.array_split(numbers, -(-len(numbers) // 4096)):
                yield self.rows(part, draw)

    def rows(self, numbers: Int[np.ndarray, " n"], draw: int) -> tuple[Float[Tensor, "m Di"], Float[Tensor, "m Dt"]]:
        """Aligned features of those of the pairs that can be read, each with its caption number ``draw``."""
        images, texts = [], []
        for start in range(0, len(numbers), 256):
            part = numbers[start : start + 256]
            picks = SampleIndices(part, np.full(len(part), draw), np.zeros(len(part), dtype=np.int64))
            read = self.sides.image(picks, self.index.__getitem__)
            self.tally.add(read.skipped)
            if read.kept:
                images.append(pool_inputs(self.model.image, read.inputs))
                text = self.sides.text(picks[read.kept], self.index.__getitem__).inputs
                texts.append(pool_inputs(self.model.text, text))
        if not images:
            device = next(self.model.parameters()).device
            image, text = self.model.image, self.model.text
            return torch.empty(0, image.width, device=device), torch.empty(0, text.width, device=device)
        return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def pool_inputs(tower: Tower, inputs: ImageInput | TextInput) -> Float[Tensor, "B D"]:
    """The pooled features of a tower, which ``inputs`` may be already."""
    moved = to_device(inputs, next(tower.parameters()).device)
    return moved.values if isinstance(moved, PooledFeatures) else tower.pooled(moved)
