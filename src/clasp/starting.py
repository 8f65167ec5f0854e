"""Where two heads start: the mean and deviation of the training pairs, and, if asked for, the closed form.

In go a model whose heads are untrained and the pairs they will be trained on, out comes nothing: the heads are changed
in place, before the first step. A run that goes on must not do it again.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.data.batches import Tally
from clasp.data.pairs import Pairs
from clasp.data.sides import Listing, LiveImages, LiveTexts, Picks
from clasp.inputs import Inputs
from clasp.model import DualEncoder, HeadSettings
from clasp.nn.towers import Tower
from clasp.train.closed import cca
from clasp.types import ImageInput, Pixels, Pooled, TextInput, Tokens

LOOKED_AT = 2048  # pairs, evenly spread, whose mean and deviation are taken for those of all


def start_heads(
    model: DualEncoder, inputs: Inputs, pairs: Pairs, listing: Listing, settings: HeadSettings, tally: Tally
) -> None:
    """Let the heads start from the training pairs, as the settings say; images that cannot be read go to ``tally``."""
    if not settings.standardize:
        return
    pooled = _PooledRows(model, inputs, pairs, listing, tally)
    heads, count = (model.image_head, model.text_head), len(pairs)
    some = pooled.rows(np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(np.int64)), draw=0)
    for head, features in zip(heads, some, strict=True):
        assert head.standardize is not None
        head.standardize.start_from(features)
    if settings.start == "cca":
        captions = np.diff(listing.first)
        every = [np.flatnonzero(captions > draw) for draw in range(int(captions.max()))]
        batches = (
            tuple(head.standardize(rows) for head, rows in zip(heads, pooled.rows(part, draw), strict=True))
            for draw, numbers in enumerate(every)
            for part in np.array_split(numbers, -(-len(numbers) // 4096))
        )
        with torch.no_grad():
            maps = cca(batches, settings.width, ridge=settings.ridge)
            for head, weight in zip(heads, (maps.image, maps.text), strict=True):
                head.map.weight.copy_(weight)
                head.map.bias.zero_()


class _PooledRows:
    """Both towers' pooled output for chosen pairs, each with its caption number ``draw``."""

    def __init__(self, model: DualEncoder, inputs: Inputs, pairs: Pairs, listing: Listing, tally: Tally):
        self.model, self.listing, self.tally = model, listing, tally
        self.image = inputs.image_side(pairs, None) if inputs.image_frozen else LiveImages(inputs.transform)
        self.text = inputs.text_side(listing) if inputs.text_frozen else LiveTexts(inputs.tokenizer)

    def rows(self, numbers: Int[np.ndarray, " n"], draw: int) -> tuple[Float[Tensor, "m Di"], Float[Tensor, "m Dt"]]:
        """Aligned features of those of the pairs that can be read."""
        images, texts = [], []
        for start in range(0, len(numbers), 256):
            part = numbers[start : start + 256]
            picks = Picks(part, np.full(len(part), draw), np.zeros(len(part), dtype=np.int64))
            seen = self.image(picks, self.listing.__getitem__)
            self.tally.add(seen.skipped)
            if seen.kept:
                images.append(_pooled(self.model.image, seen.inputs))
                texts.append(_pooled(self.model.text, self.text(picks[seen.kept], self.listing.__getitem__).inputs))
        if not images:
            return tuple(torch.empty(0, tower.width) for tower in (self.model.image, self.model.text))
        return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def _pooled(tower: Tower, inputs: ImageInput | TextInput) -> Float[Tensor, "B D"]:
    device = next(tower.parameters()).device
    if isinstance(inputs, Pooled):
        return inputs.values.to(device)
    if isinstance(inputs, Pixels):
        return tower.pooled(Pixels(inputs.values.to(device)))
    return tower.pooled(Tokens(inputs.ids.to(device), inputs.mask.to(device)))
