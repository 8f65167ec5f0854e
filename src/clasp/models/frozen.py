"""The frozen part of a tower, for the feature cache: the whole tower with its pooling, or its frozen prefix.

Input: a tower whose trainable parameters are selected. Output: the part whose outputs can be cached
(``clasp.data.feature_cache.requests.FrozenPart``), or ``None`` where every block trains or dropout makes the outputs
random.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from clasp.models.precision import computing_in
from clasp.models.tower import Tower
from clasp.models.weight_hashes import hash_values
from clasp.plain_types import Precision
from clasp.types import HiddenStates, Pixels, PooledFeatures, Tokens


@dataclass(frozen=True)
class FrozenTower:
    """A tower without trainable parameters: inputs to pooled vectors."""

    tower: Tower
    depth: int = 0
    tokens: int = 1
    precision: Precision = "float32"

    @property
    def fingerprint(self) -> str:
        weights = _in_precision(self.tower.layer_fingerprint, self.precision)
        products = self.tower.attends_in_products or self.tower.packs_captions
        weights += _kernel_suffix(self.precision, self.tower, products)
        if self.precision == "float32":
            return weights
        # captions without padding, which attend in products, and class tokens without patches differ in their last bits
        weights += ":unpadded-scaled-products" if self.tower.packs_captions else ""
        return weights + (":class-token" if self.tower.can_leave_out_patches else "")

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        return self.tower.pooled_layers

    @property
    def width(self) -> int:
        return self.tower.width

    def __call__(self, inputs: Pixels | Tokens) -> PooledFeatures:
        with computing_in(self.precision, _device(self.tower)):
            return PooledFeatures(self.tower.pooled(inputs))


@dataclass(frozen=True)
class FrozenPrefix:
    """The frozen prefix of a tower: inputs to the hidden states after its last block, ``depth``.

    ``size`` is the side of the input images, pixels.
    """

    tower: Tower
    depth: int
    size: int
    precision: Precision = "float32"

    @property
    def fingerprint(self) -> str:
        weights = _in_precision(self.tower.prefix_fingerprint(self.depth), self.precision)
        weights += _kernel_suffix(self.precision, self.tower, self.tower.attends_in_products)
        products = self.precision != "float32" and self.tower.packs_captions  # batches without padding attend in them
        return weights + (":unpadded-products" if products else "")

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
        device = _device(self.tower)
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        if self.tower.modality == "text":
            blank: Pixels | Tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        else:
            blank = Pixels(torch.zeros(1, 3, self.size, self.size, device=device))
        with torch.no_grad():
            _, tokens, width = self(blank).values.shape
        return tokens, width

    def __call__(self, inputs: Pixels | Tokens) -> HiddenStates:
        with computing_in(self.precision, _device(self.tower)):
            return self.tower.prefix_states(inputs, self.depth)


def _kernel_suffix(precision: Precision, tower: Tower, products: bool) -> str:
    """Differs by the attention kernel (``models.plain_attention``), whose outputs differ in their last bits.

    ``products``: whether the part attends in plain products in bfloat16 whatever the kernel, so that training and
    evaluation share its features.
    """
    if not tower.attends or (torch.backends.cuda.flash_sdp_enabled() and not (products and precision != "float32")):
        return ""
    return ":plain" if precision == "float32" else ":scaled-products"


def find_frozen_part(tower: Tower, size: int, precision: Precision = "float32") -> FrozenTower | FrozenPrefix | None:
    """The part of a tower that can be cached, for images of ``size`` pixels a side; ``None`` where nothing can.

    ``precision`` is what it computes in; see ``frozen_precision``.
    """
    if tower.dropout:
        return None
    if tower.fully_frozen:
        return FrozenTower(tower, precision=precision)
    return FrozenPrefix(tower, depth, size, precision) if (depth := tower.frozen_blocks) else None


def _device(tower: Tower) -> torch.device:
    return next(tower.parameters()).device


def _in_precision(fingerprint: str, precision: Precision) -> str:
    """A fingerprint of features in this precision; in float32 that of the weights, as it was before others existed."""
    return fingerprint if precision == "float32" else hash_values(fingerprint, precision)
