"""The reader of a model's inputs before anything is computed: it writes down what it would keep.

In go the same requests as in training and evaluation, out comes a list of ``CachePlan``. Unusual: it takes the place of
``FeatureSource`` and answers every request with "live", so whoever asks goes the way of a run and nothing runs.
``count_frozen_flops`` is its other half: what the frozen part of a tower takes, where it is kept, counted on a few
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clasp.data.device import to_device
from clasp.data.images import Augment
from clasp.data.pairs import Pairs
from clasp.data.readers import ImageReader, LiveImageReader, LiveTextReader, TextReader
from clasp.models.features import CachePlan, FeatureSource
from clasp.models.frozen import FrozenPrefix, FrozenTower
from clasp.training.cost.flops import count_flops
from clasp.training.cost.ledger import FrozenFlops
from clasp.types import Pixels, Tokens

CAPTION_SAMPLE_SIZE = 16  # of all lengths, each by itself: what one takes is nearly a straight line of its tokens


class DryRunFeatureSource(FeatureSource):
    """``plans`` has what would be kept, each file once, in the order it would be computed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.plans: list[CachePlan] = []
        self._read: list[set[str]] = []

    def image_features(self, pairs: Pairs, augment: Augment | None = None) -> None:
        self._add_plan(self.image_cache_plan(pairs, augment))

    def text_features(self, texts: Sequence[str]) -> None:
        if any(earlier.issuperset(texts) for earlier in self._read):
            return  # these are found among what was read before
        keeping = self.text_cache_plan(texts)
        if keeping is not None and keeping.storage is not None:
            self._read.append(set(texts))
        self._add_plan(keeping)

    def texts(self, texts: Mapping[str, str]) -> Any:
        self.text_features(list(texts.values()))
        return super().texts(texts)

    def free_bytes(self) -> int:
        """As it will be when what was noted is there."""
        return super().free_bytes() - sum(keeping.bytes_to_write for keeping in self.plans)

    def _add_plan(self, keeping: CachePlan | None) -> None:
        if keeping is not None and all(keeping.key != other.key for other in self.plans):
            self.plans.append(keeping)


def count_frozen_flops(
    inputs: FeatureSource, image_side: ImageReader, text_side: TextReader, texts: Sequence[str]
) -> dict[str, FrozenFlops]:
    """FLOPs of the frozen part of each tower that is read from what was kept, for an image or for a caption.

    A blank image goes through it, and some of the captions; where a side is read live, its frozen part runs in every
    step and is counted there.
    """
    made = {}
    if inputs.frozen_image_part is not None and not isinstance(image_side, LiveImageReader):
        size = inputs.transform.size
        made["image"] = _frozen_flops_of(inputs.frozen_image_part, [Pixels(torch.zeros(1, 3, size, size))], "an image")
    if inputs.frozen_text_part is not None and not isinstance(text_side, LiveTextReader):
        different = sorted(set(texts), key=len)
        some = different[:: -(-len(different) // CAPTION_SAMPLE_SIZE)]
        what = f"a caption, the mean of {len(some)} of all lengths"
        made["text"] = _frozen_flops_of(
            inputs.frozen_text_part, [inputs.tokenizer([caption]) for caption in some], what
        )
    return made


def _frozen_flops_of(part: FrozenTower | FrozenPrefix, samples: Sequence[Pixels | Tokens], one: str) -> FrozenFlops:
    device = next(part.tower.parameters()).device
    with torch.inference_mode():
        flops = count_flops(lambda: [_forward_frozen(part, to_device(sample, device)) for sample in samples])
    which = "all" if isinstance(part, FrozenTower) else f"blocks 1 to {part.depth}"
    return FrozenFlops(round(flops.forward / len(samples)), f"{which} of {part.tower.name}, once for {one}")


def _forward_frozen(part: FrozenTower | FrozenPrefix, sample: Pixels | Tokens) -> None:
    if isinstance(part, FrozenPrefix):
        part(sample)
        return
    states = part.tower(sample)
    real = sample.mask if isinstance(sample, Tokens) else states.new_ones(states.shape[:2], dtype=torch.bool)
    part.tower.pool(states, real)
