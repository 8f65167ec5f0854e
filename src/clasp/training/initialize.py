"""What starts from the training pairs: two heads, and low-rank updates that ask for it.

In go an untrained model and the pairs that it will be trained on, out comes nothing: heads get the mean and deviation
of the features and, if asked for, the closed form; low-rank updates the directions of their gradient. Both are changed
in place, before the first step. A run that goes on must not do it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clasp.data.device import to_device
from clasp.data.feature_cache.replay import CachedImageReader, CachedTextReader
from clasp.data.loader import BadSampleLimit, BatchReader, PairLoader
from clasp.data.readers import PairIndex, SampleIndices
from clasp.models.dual_encoder import DualEncoder, HeadSettings
from clasp.models.tower import Tower
from clasp.models.tuning.peft_methods import initialize_lora_from_gradient, wrapped_weight_name
from clasp.models.tuning.settings import TuneSettings
from clasp.models.tuning.spec import freeze_except, gradient_initialized_layers
from clasp.training import grad_cache
from clasp.training.cca import cca
from clasp.training.precision import resolve_precision
from clasp.training.settings import TrainSettings
from clasp.training.step import seed_generators, step_seed
from clasp.types import Batch, ImageInput, Loss, PooledFeatures, TextInput, UserError

# captions, with their images, whose mean and deviation are taken for those of all; rows of a cache cost nothing
_MAX_CAPTIONS_CACHED, _MAX_CAPTIONS_LIVE = 65_536, 2_048
GRADIENT_BATCHES = 4  # whose gradient gives low-rank updates their directions: as much work as so many steps


def initialize_heads(model: DualEncoder, sides: BatchReader, settings: HeadSettings, tally: BadSampleLimit) -> None:
    """Let the heads start from the training pairs, as the settings say; images that cannot be read go to ``tally``.

    ``sides`` read the plain images, and their pairs are a ``PairIndex``.
    """
    image, text = model.image_head.standardize, model.text_head.standardize
    if image is None or text is None:
        return
    assert isinstance(sides.pairs, PairIndex)
    pooled = _PooledFeatures(model, sides, sides.pairs, tally)
    most = _MAX_CAPTIONS_CACHED if _reads_vectors(sides) else _MAX_CAPTIONS_LIVE
    some = zip(*pooled.every_caption(_evenly_spaced(sides.pairs, most)), strict=True)
    for standardize, parts in zip((image, text), some, strict=True):
        standardize.fit(torch.cat(parts))
    if settings.init == "cca":
        with torch.no_grad():
            whole = np.arange(len(sides.pairs))
            every = ((image(images), text(texts)) for images, texts in pooled.every_caption(whole))
            maps = cca(every, settings.width, ridge=settings.ridge)
            for head, weight in ((model.image_head, maps.image), (model.text_head, maps.text)):
                assert isinstance(head.map, nn.Linear)
                head.map.weight.copy_(weight)
                head.map.bias.zero_()


def initialize_low_rank(
    model: DualEncoder, batches: PairLoader, loss: Loss, tuned: TuneSettings, settings: TrainSettings
) -> None:
    """Let the low-rank updates that ask for it (``init="gradient"``) start along the gradient of what they update.

    The gradient is of the real loss over the first batches of the first epoch, in pieces where those do not fit in
    memory; it goes to the wrapped weights of the base, which do not change. See ``nn.lowrank.start_from_gradient``.
    A layer that no gradient reaches keeps the start that it drew.
    Raises ``UserError`` where a gradient is not finite.
    """
    names = {id(p): name for name, p in model.named_parameters()}  # of what both towers share, one name
    layers = {
        names[id(tower.net.get_parameter(wrapped_weight_name(path)))]: (tower.net, path)
        for tower, specs in ((model.image, tuned.image), (model.text, tuned.text))
        for path in gradient_initialized_layers(tower.net, specs)
    }
    if not layers:
        return
    for name, gradient in _gradients(model, layers, batches, loss, settings).items():
        initialize_lora_from_gradient(*layers[name], gradient)


def _gradients(
    model: DualEncoder, names: Iterable[str], batches: PairLoader, loss: Loss, settings: TrainSettings
) -> dict[str, Tensor]:
    """The gradient of parameters that are frozen otherwise, summed over a few batches."""
    device = next(model.parameters()).device

    def seed(side: grad_cache.Modality, piece: int) -> None:
        seed_generators(step_seed(settings.seed, 0, "start", side, piece), device)

    work = grad_cache.MicroBatchEmbedder(model, device, resolve_precision(settings.precision, device).precision, seed)
    micro_batch = None if settings.micro_batch == "auto" else settings.micro_batch
    selection, wanted = model.selection, {name: model.get_parameter(name) for name in names}
    freeze_except(model, wanted)
    model.train()
    try:
        told_apart = (batch for batch in batches.epoch(0) if len(batch.ids) > 1)
        for batch in islice(told_apart, GRADIENT_BATCHES):
            micro_batch = micro_batch or _choose_micro_batch(work, batch)
            grad_cache.backward_in_micro_batches(work, batch, loss, micro_batch)
        found = {name: p.grad for name, p in wanted.items() if p.grad is not None}
    finally:
        for p in wanted.values():
            p.grad = None
        model.select(selection)
        model.train(False)
    for name, gradient in found.items():
        if not gradient.isfinite().all():
            raise UserError(
                f"the gradient that init='gradient' asks for is not finite at {name}; try train.precision=float32, or "
                "init='random'"
            )
    return found


def _choose_micro_batch(work: grad_cache.MicroBatchEmbedder, batch: Batch) -> int:
    return grad_cache.choose_micro_batch(work, batch, len(batch.ids)).micro_batch


def _reads_vectors(sides: BatchReader) -> bool:
    """Whether both sides are cached vectors of wholly frozen towers."""
    return (isinstance(sides.image, CachedImageReader) and sides.image.features.pooled) and (
        isinstance(sides.text, CachedTextReader) and sides.text.features.pooled
    )


def _evenly_spaced(listing: PairIndex, most: int) -> Int[np.ndarray, " n"]:
    """Pairs evenly spread over all, with at most about ``most`` captions."""
    count = max(1, min(len(listing), most * len(listing) // int(listing.caption_offsets[-1])))
    return np.unique(np.linspace(0, len(listing) - 1, count).astype(np.int64))


class _PooledFeatures:
    """Both towers' pooled output for chosen pairs."""

    def __init__(self, model: DualEncoder, sides: BatchReader, listing: PairIndex, tally: BadSampleLimit):
        self.model, self.sides, self.listing, self.tally = model, sides, listing, tally

    def every_caption(
        self, pairs: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Float[Tensor, "m Di"], Float[Tensor, "m Dt"]]]:
        """Each caption of these pairs once, with its image."""
        captions = np.diff(self.listing.caption_offsets)[pairs]
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
            seen = self.sides.image(picks, self.listing.__getitem__)
            self.tally.add(seen.skipped)
            if seen.kept:
                images.append(_pool(self.model.image, seen.inputs))
                texts.append(_pool(self.model.text, self.sides.text(picks[seen.kept], self.listing.__getitem__).inputs))
        if not images:
            device = next(self.model.parameters()).device
            image, text = self.model.image, self.model.text
            return torch.empty(0, image.width, device=device), torch.empty(0, text.width, device=device)
        return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def _pool(tower: Tower, inputs: ImageInput | TextInput) -> Float[Tensor, "B D"]:
    moved = to_device(inputs, next(tower.parameters()).device)
    return moved.values if isinstance(moved, PooledFeatures) else tower.pooled(moved)
