"""The reader of a model's inputs before anything is computed: it writes down what it would keep.

In go the same requests as in training and evaluation, out comes a list of ``Keeping``. Unusual: it takes the place of
``Inputs`` and answers every request with "live", so whoever asks goes the way of a run and nothing runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clasp.data.images import Augment
from clasp.data.pairs import Pairs
from clasp.inputs import Inputs, Keeping


class Forecast(Inputs):
    """``noted`` has what would be kept, each file once, in the order it would be computed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.noted: list[Keeping] = []
        self._read: list[set[str]] = []

    def image_features(self, pairs: Pairs, augment: Augment | None = None) -> None:
        self._note(self.keeping_of_images(pairs, augment))

    def text_features(self, texts: Sequence[str]) -> None:
        if any(earlier.issuperset(texts) for earlier in self._read):
            return  # these are found among what was read before
        keeping = self.keeping_of_texts(texts)
        if keeping is not None and keeping.storage is not None:
            self._read.append(set(texts))
        self._note(keeping)

    def texts(self, texts: Mapping[str, str]) -> Any:
        self.text_features(list(texts.values()))
        return super().texts(texts)

    def free_bytes(self) -> int:
        """As it will be when what was noted is there."""
        return super().free_bytes() - sum(keeping.more_bytes for keeping in self.noted)

    def _note(self, keeping: Keeping | None) -> None:
        if keeping is not None and all(keeping.key != other.key for other in self.noted):
            self.noted.append(keeping)
