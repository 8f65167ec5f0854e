"""Features of both towers on the probe data, before and after alignment and at interpolated weights.

Input: the probe pairs and the ``FeatureSource`` of a run. Output: ``ModelFeatures`` with base weights (``before``),
tuned weights (``after``), or interpolated ones. Note: cached hidden states of a frozen prefix are reused for all
weights of a tower, since the prefix is the same in all of them; a wholly frozen tower is run once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from clasp.analysis.tower_features import TowerFeatures, extract_tower_features
from clasp.analysis.weight_interpolation import WeightInterpolation
from clasp.data.pairs import Pairs
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.models.tower import Tower
from clasp.types import ImageInput, ProgressFactory, TextInput

_ImageBatchStream = Iterable[tuple[Sequence[str], ImageInput]]

_MAX_COMPARED = 1000  # inputs on which the hidden states of blocks are compared


@dataclass(frozen=True, slots=True)
class ModelFeatures:
    """Features of a model's towers in one state: of the images, of further images to fit probes on, of the texts."""

    image: TowerFeatures
    fit: TowerFeatures | None
    text: TowerFeatures

    @property
    def fit_features(self) -> TowerFeatures:
        """Features of the images that probes are fitted on: further ones, or part of ``image``."""
        return self.fit or self.image


@dataclass(kw_only=True)
class ProbeFeatureExtractor:
    """Extracts features of a run's model and of its untuned towers (``base``) on the probe data.

    ``fit``: pairs to fit on that are not among ``pairs``. Hidden states of ``captions`` are compared, ``prompts`` are
    only embedded. At most ``_MAX_COMPARED`` images and captions are compared, chosen by a hash of their id or text.
    """

    model: DualEncoder
    base: DualEncoder
    inputs: FeatureSource
    pairs: Pairs
    fit: Pairs | None
    captions: Sequence[str]
    prompts: Sequence[str]
    bar: ProgressFactory
    _streams: dict[int, Callable[[], _ImageBatchStream]] = field(default_factory=dict)

    def before(self) -> ModelFeatures:
        """Features with base weights. Learned pooling is that of the run: the base has none."""
        self.base.image.pooling, self.base.text.pooling = self.model.image.pooling, self.model.text.pooling
        model = self.model
        image = self._image_features(model.image if model.image.fully_frozen else self.base.image, "before")
        return ModelFeatures(
            *image, self._text_features(model.text if model.text.fully_frozen else self.base.text, "before")
        )

    def after(self, before: ModelFeatures) -> ModelFeatures:
        """Features with tuned weights; those of a wholly frozen tower are taken from ``before``."""
        return self._at_state("after", before)

    def interpolated(
        self, interpolations: Sequence[WeightInterpolation], alpha: float, before: ModelFeatures
    ) -> ModelFeatures:
        """Features at base + ``alpha`` * (tuned - base) weights."""
        with ExitStack() as stack:
            for interpolation in interpolations:
                stack.enter_context(interpolation.at(alpha))
            return self._at_state(f"at {alpha:g}", before)

    def _at_state(self, state: str, before: ModelFeatures) -> ModelFeatures:
        image, text = self.model.image, self.model.text
        of_images = (before.image, before.fit) if image.fully_frozen else self._image_features(image, state)
        return ModelFeatures(*of_images, before.text if text.fully_frozen else self._text_features(text, state))

    def _image_features(self, tower: Tower, state: str) -> tuple[TowerFeatures, TowerFeatures | None]:
        ids = [pair.id for pair in self.pairs]
        features = self._extract(
            tower, self._stream(self.pairs), ids, hashed_subset(ids, _MAX_COMPARED), f"images, {state}"
        )
        if self.fit is None:
            return features, None
        ids = [pair.id for pair in self.fit]
        return features, self._extract(tower, self._stream(self.fit), ids, frozenset(), f"images to fit on, {state}")

    def _text_features(self, tower: Tower, state: str) -> TowerFeatures:
        texts = sorted({*self.captions, *self.prompts})
        return self._extract(
            tower, self.inputs.read(texts), texts, hashed_subset(self.captions, _MAX_COMPARED), f"captions, {state}"
        )

    def _stream(self, pairs: Pairs) -> _ImageBatchStream:
        """One stream per set of pairs, so that status lines and unreadable images are reported once."""
        if id(pairs) not in self._streams:
            self._streams[id(pairs)] = self.inputs.images(pairs)
        return self._streams[id(pairs)]()

    def _extract(
        self,
        tower: Tower,
        stream: _ImageBatchStream | Iterable[tuple[Sequence[str], TextInput]],
        ids: Sequence[str],
        sample: frozenset[str],
        what: str,
    ) -> TowerFeatures:
        with self.bar(f"{tower.name}: {what}") as progress:
            return extract_tower_features(tower, stream, sample, lambda done: progress(done, len(ids)))


def hashed_subset(ids: Iterable[str], limit: int) -> frozenset[str]:
    """At most ``limit`` of the ids, chosen by a hash of each, independent of their order."""

    def rank(id: str) -> bytes:
        return hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()

    return frozenset(sorted(set(ids), key=rank)[:limit])
