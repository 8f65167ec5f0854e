"""The inputs of a model: live pixels and tokens, or the cached output of a frozen tower or frozen prefix.

Input: a model's towers with their transform and tokenizer, and pairs. Output: both sides of training batches, and
streams for evaluations. Note: a facade over ``ImageSide`` and ``TextSide``, which implement each side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from clasp.data.feature_cache.replay import CachedFeatures
from clasp.data.images import Augment, ImageTransform
from clasp.data.loader import BatchReader
from clasp.data.pairs import Pairs
from clasp.data.readers import ImageReader, PairIndex, TextReader
from clasp.data.tokenizer import Tokenizer
from clasp.models.encoder_in_precision import EncoderInPrecision
from clasp.models.feature_settings import FeatureCallbacks, FeatureSettings
from clasp.models.frozen import FrozenPrefix, FrozenTower
from clasp.models.image_side import ImageSide, ImageStream
from clasp.models.inference import EncoderPrecision
from clasp.models.text_side import TextSide, TextStream
from clasp.models.tower import Tower
from clasp.types import Encoder


class FeatureSource:
    """Reads the images and captions of pairs for one model."""

    def __init__(
        self,
        image: Tower,
        text: Tower,
        *,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        settings: FeatureSettings,
        callbacks: FeatureCallbacks | None = None,
    ):
        callbacks = callbacks or FeatureCallbacks()
        self.cache, self.precision_choice = settings.cache, settings.precision
        self.precision = EncoderPrecision(settings.tower_precision(image), settings.tower_precision(text))
        self.image = ImageSide(image, transform, settings, callbacks)
        self.text = TextSide(text, tokenizer, settings, callbacks)

    @property
    def transform(self) -> ImageTransform:
        return self.image.transform

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    @property
    def frozen_image_part(self) -> FrozenTower | FrozenPrefix | None:
        """The cacheable part of the image tower; ``None`` also where ``data.feature_cache`` is off."""
        return self.image.frozen_part

    @property
    def frozen_text_part(self) -> FrozenTower | FrozenPrefix | None:
        """The cacheable part of the text tower; ``None`` also where ``data.feature_cache`` is off."""
        return self.text.frozen_part

    @property
    def both_towers_frozen(self) -> bool:
        """Whether both towers are fully frozen and cached: a batch is then pooled features, at almost no cost."""
        return isinstance(self.frozen_image_part, FrozenTower) and isinstance(self.frozen_text_part, FrozenTower)

    # --- training ------------------------------------------------------------------------------------------------

    def batch_reader(self, pairs: Pairs, index: PairIndex, augment: Augment | None) -> BatchReader:
        """Both sides of training batches; ``index`` is of ``pairs``."""
        return BatchReader(index, self.image_reader(pairs, augment), self.text_reader(index))

    def image_reader(self, pairs: Pairs, augment: Augment | None) -> ImageReader:
        """The image side of training batches. Augmented images are read live, unless augmented views are cached."""
        return self.image.reader(pairs, augment)

    def text_reader(self, index: PairIndex) -> TextReader:
        """The text side of training batches."""
        return self.text.reader(index)

    def image_features(self, pairs: Pairs, augment: Augment | None = None) -> CachedFeatures | None:
        """The output of the image tower's frozen part for every image; ``None`` to read them live."""
        return self.image.features(pairs, augment)

    def text_features(self, texts: Sequence[str]) -> CachedFeatures | None:
        """The output of the text tower's frozen part for every text; ``None`` to read them live."""
        return self.text.features(texts)

    # --- evaluation ----------------------------------------------------------------------------------------------

    def in_precision(self, model: Encoder) -> Encoder:
        """The model, with live towers in the precision in which features are computed; itself in float32."""
        if self.precision == EncoderPrecision():
            return model
        return EncoderInPrecision(model, self.precision)

    def images(self, pairs: Pairs) -> Callable[[], ImageStream]:
        """A stream of the images of ``pairs`` with their ids; each call starts it anew."""
        return self.image.stream(pairs)

    def texts(self, texts: Mapping[str, str]) -> Callable[[], TextStream]:
        """A stream of captions, given as id to text; each call starts it anew."""
        return lambda: self.text.stream(list(texts), list(texts.values()))

    def read(self, texts: Sequence[str]) -> TextStream:
        """A stream of texts that are their own ids (prompts of a zero-shot classifier)."""
        return self.text.stream(list(texts), list(texts))

    def precompute_texts(self, texts: Iterable[str]) -> None:
        """Cache the text features of many small requests at once; later requests reuse them."""
        unique = sorted(set(texts))
        if unique:
            self.text.features(unique)
