"""Where two heads start: the mean and deviation of the training pairs, and, if asked for, the closed form.

In go a model whose heads are untrained and the pairs they will be trained on, out comes nothing: the heads are changed
in place, before the first step. A run that goes on must not do it again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clasp.data.batches import Tally
from clasp.data.device import on_device
from clasp.data.pairs import Pairs
from clasp.data.sides import Listing, Picks
from clasp.inputs import Inputs
from clasp.model import DualEncoder, HeadSettings
from clasp.nn.towers import Tower
from clasp.train.closed import cca
from clasp.types import ImageInput, Pooled, TextInput

# captions, with their images, whose mean and deviation are taken for those of all; rows of a cache cost nothing
LOOKED_AT_CACHED, LOOKED_AT_LIVE = 65_536, 2_048


def start_heads(
    model: DualEncoder, inputs: Inputs, pairs: Pairs, listing: Listing, settings: HeadSettings, tally: Tally
) -> None:
    """Let the heads start from the training pairs, as the settings say; images that cannot be read go to ``tally``."""
    image, text = model.image_head.standardize, model.text_head.standardize
    if image is None or text is None:
        return
    pooled = _PooledRows(model, inputs, pairs, listing, tally)
    most = LOOKED_AT_CACHED if inputs.all_pooled else LOOKED_AT_LIVE
    some = zip(*pooled.every_caption(_spread(listing, most)), strict=True)
    for standardize, parts in zip((image, text), some, strict=True):
        standardize.start_from(torch.cat(parts))
    if settings.start == "cca":
        with torch.no_grad():
            whole = np.arange(len(pairs))
            every = ((image(images), text(texts)) for images, texts in pooled.every_caption(whole))
            maps = cca(every, settings.width, ridge=settings.ridge)
            for head, weight in ((model.image_head, maps.image), (model.text_head, maps.text)):
                assert isinstance(head.map, nn.Linear)
                head.map.weight.copy_(weight)
                head.map.bias.zero_()


def _spread(listing: Listing, most: int) -> Int[np.ndarray, " n"]:
    """Pairs evenly spread over all, with at most about ``most`` captions."""
    count = max(1, min(len(listing), most * len(listing) // int(listing.first[-1])))
    return np.unique(np.linspace(0, len(listing) - 1, count).astype(np.int64))


class _PooledRows:
    """Both towers' pooled output for chosen pairs."""

    def __init__(self, model: DualEncoder, inputs: Inputs, pairs: Pairs, listing: Listing, tally: Tally):
        self.model, self.listing, self.tally = model, listing, tally
        self.image, self.text = inputs.image_side(pairs, None), inputs.text_side(listing)

    def every_caption(
        self, pairs: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Float[Tensor, "m Di"], Float[Tensor, "m Dt"]]]:
        """Each caption of these pairs once, with its image."""
        captions = np.diff(self.listing.first)[pairs]
        for draw in range(int(captions.max())):
            numbers = pairs[captions > draw]
            for part in np.array_split(numbers, -(-len(numbers) // 4096)):
                yield self.rows(part, draw)

    def rows(self, numbers: Int[np.ndarray, " n"], draw: int) -> tuple[Float[Tensor, "m Di"], Float[Tensor, "m Dt"]]:
        """Aligned features of those of the pairs that can be read, each with its caption number ``draw``."""
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
            device = self.model.log_scale.device
            image, text = self.model.image, self.model.text
            return torch.empty(0, image.width, device=device), torch.empty(0, text.width, device=device)
        return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def _pooled(tower: Tower, inputs: ImageInput | TextInput) -> Float[Tensor, "B D"]:
    moved = on_device(inputs, next(tower.parameters()).device)
    return moved.values if isinstance(moved, Pooled) else tower.pooled(moved)
