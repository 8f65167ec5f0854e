"""The reader of a model's inputs before anything is computed: it writes down what it would keep.

In go the same requests as in training and evaluation, out comes a list of ``CachePlan``. Unusual: it takes the place of
``FeatureSource`` and answers every request with "live", so whoever asks goes the way of a run and nothing runs.
``count_frozen_flops`` is its other half: what the frozen part of a tower takes, where it is kept, counted on a few
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clasp.data.images import Augment
from clasp.data.pairs import Pairs
from clasp.models.features import CachePlan, FeatureSource


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
