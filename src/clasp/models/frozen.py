"""The frozen part of a tower, as the feature cache takes it: all of it with its pooling, or its trunk.

In goes a tower whose selection is made, out comes what may be computed once
(``clasp.data.feature_cache.requests.FrozenPart``), or nothing where every weight trains or dropout makes each output
another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from clasp.models.tower import Tower
from clasp.types import HiddenStates, Pixels, PooledFeatures, Tokens


@dataclass(frozen=True)
class FrozenTower:
    """A tower in which nothing trains: its inputs to one vector each."""

    tower: Tower
    depth: int = 0
    tokens: int = 1

    @property
    def fingerprint(self) -> str:
        return self.tower.fingerprint

    @property
    def width(self) -> int:
        return self.tower.width

    def __call__(self, inputs: Pixels | Tokens) -> PooledFeatures:
        return PooledFeatures(self.tower.pooled(inputs))


@dataclass(frozen=True)
class FrozenPrefix:
    """The blocks of a tower below everything that trains: inputs to states after the last of them.

    ``size`` is the side in pixels of the images it will read.
    """

    tower: Tower
    depth: int
    size: int

    @property
    def fingerprint(self) -> str:
        return self.tower.prefix_fingerprint(self.depth)

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


def find_frozen_part(tower: Tower, size: int) -> FrozenTower | FrozenPrefix | None:
    """What of a tower may be computed once, for images of ``size`` pixels a side; ``None`` where nothing may."""
    if tower.dropout:
        return None
    if tower.fully_frozen:
        return FrozenTower(tower)
    return FrozenPrefix(tower, depth, size) if (depth := tower.frozen_blocks) else None
