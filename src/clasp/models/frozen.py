"""The frozen part of a tower, for the feature cache: the whole tower with its pooling, or its frozen prefix.

Input: a tower whose trainable parameters are selected. Output: the part whose outputs can be cached
(``clasp.data.feature_cache.requests.FrozenPart``), or ``None`` where every block trains or dropout makes the outputs
random.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from clasp.models.tower import Tower
from clasp.types import HiddenStates, Pixels, PooledFeatures, Tokens


@dataclass(frozen=True)
class FrozenTower:
    """A tower without trainable parameters: inputs to pooled vectors."""

    tower: Tower
    depth: int = 0
    tokens: int = 1

    @property
    def fingerprint(self) -> str:
        return self.tower.layer_fingerprint + _kernel_suffix()

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        return self.tower.pooled_layers

    @property
    def width(self) -> int:
        return self.tower.width

    def __call__(self, inputs: Pixels | Tokens) -> PooledFeatures:
        return PooledFeatures(self.tower.pooled(inputs))


@dataclass(frozen=True)
class FrozenPrefix:
    """The frozen prefix of a tower: inputs to the hidden states after its last block, ``depth``.

    ``size`` is the side of the input images, pixels.
    """

    tower: Tower
    depth: int
    size: int

    @property
    def fingerprint(self) -> str:
        return self.tower.prefix_fingerprint(self.depth) + _kernel_suffix()

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        return ()

    @property
    def tokens(self) -> int:
        return self._shape[0]

    @property
    def width(self) -> int:
        return self._shape[1]

    @cached_property
    def _shape(self) -> tuple[int, int]:
        device = next(self.tower.parameters()).device
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        if self.tower.modality == "text":
            blank: Pixels | Tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        else:
            blank = Pixels(torch.zeros(1, 3, self.size, self.size, device=device))
        with torch.no_grad():
            _, tokens, width = self(blank).values.shape
        return tokens, width

    def __call__(self, inputs: Pixels | Tokens) -> HiddenStates:
        return self.tower.prefix_states(inputs, self.depth)


def _kernel_suffix() -> str:
    """Differs by the attention kernel (``training.attention_kernel``), whose outputs differ in their last bits."""
    return "" if torch.backends.cuda.flash_sdp_enabled() else ":plain"


def find_frozen_part(tower: Tower, size: int) -> FrozenTower | FrozenPrefix | None:
    """The part of a tower that can be cached, for images of ``size`` pixels a side; ``None`` where nothing can."""
    if tower.dropout:
        return None
    if tower.fully_frozen:
        return FrozenTower(tower)
    return FrozenPrefix(tower, depth, size) if (depth := tower.frozen_blocks) else None
