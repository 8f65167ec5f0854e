"""FLOPs of the frozen part of each tower where its output is cached: computed once, not in each step.

Input: a feature source and both sides of training batches. Output: ``FrozenFlops`` by side, for the cost ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from clasp.data.device import to_device
from clasp.data.loader import BatchReader
from clasp.data.readers import LiveImageReader, LiveTextReader
from clasp.models.features import FeatureSource
from clasp.models.frozen import FrozenPrefix, FrozenTower
from clasp.training.cost.flops import count_flops
from clasp.training.cost.ledger import FrozenFlops
from clasp.types import Pixels, Tokens

CAPTION_SAMPLE_SIZE = 16  # of all lengths, one at a time: FLOPs are nearly linear in the number of tokens


def count_frozen_flops(inputs: FeatureSource, sides: BatchReader, texts: Sequence[str]) -> dict[str, FrozenFlops]:
    """FLOPs of the frozen part of each tower whose output is cached, per image or caption.

    Measured on a blank image and a sample of the captions; where a side is not cached, its frozen part runs in every
    step and is counted there.
    """
    made = {}
    if inputs.frozen_image_part is not None and not isinstance(sides.image, LiveImageReader):
        size = inputs.transform.size
        made["image"] = _frozen_flops_of(inputs.frozen_image_part, [Pixels(torch.zeros(1, 3, size, size))], "an image")
    if inputs.frozen_text_part is not None and not isinstance(sides.text, LiveTextReader):
        different = sorted(set(texts), key=len)
        some = different[:: -(-len(different) // CAPTION_SAMPLE_SIZE)]
        what = f"a caption, the mean of {len(some)} of all lengths"
        made["text"] = _frozen_flops_of(
            inputs.frozen_text_part, [inputs.tokenizer([caption]) for caption in some], what
        )
    return made


def _frozen_flops_of(part: FrozenTower | FrozenPrefix, samples: Sequence[Pixels | Tokens], one: str) -> FrozenFlops:
    device = next(part.tower.parameters()).device
    of_shape: dict[torch.Size, int] = {}  # captions without padding: those of one length take as many
    total = 0
    for sample in samples:
        shape = sample.values.shape if isinstance(sample, Pixels) else sample.ids.shape
        if shape not in of_shape:
            moved = to_device(sample, device)
            with torch.inference_mode():
                of_shape[shape] = count_flops(partial(_forward_frozen, part, moved)).forward
        total += of_shape[shape]
    which = "all" if isinstance(part, FrozenTower) else f"blocks 1 to {part.depth}"
    return FrozenFlops(round(total / len(samples)), f"{which} of {part.tower.name}, once for {one}")


def _forward_frozen(part: FrozenTower | FrozenPrefix, sample: Pixels | Tokens) -> None:
    if isinstance(part, FrozenPrefix):
        part(sample)
        return
    states = part.tower(sample)
    real = sample.mask if isinstance(sample, Tokens) else states.new_ones(states.shape[:2], dtype=torch.bool)
    part.tower.pool(states, real)
