"""What a model reads of some pairs: live pixels and tokens, or the cached output of a tower's frozen part.

In: a model's towers with their transform and tokenizer, and pairs. Out: both sides of training batches, and the streams
that evaluations read. Note: only a name for the two sides together (``image``, ``text``); whatever is true of one side
alone is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from clasp.data.feature_cache.replay import CachedFeatures
from clasp.data.images import Augment, ImageTransform
from clasp.data.loader import BatchReader
from clasp.data.pairs import Pairs
from clasp.data.readers import ImageReader, PairIndex, TextReader
from clasp.data.tokenizer import Tokenizer
from clasp.models.feature_settings import FeatureCallbacks, FeatureSettings
from clasp.models.frozen import FrozenPrefix, FrozenTower
from clasp.models.image_side import ImageSide, ImageStream
from clasp.models.text_side import TextSide, TextStream
from clasp.models.tower import Tower


class FeatureSource:
    """Reads pairs for one model."""

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
        self.cache = settings.cache
        self.image = ImageSide(image, transform, settings, callbacks)
        self.text = TextSide(text, tokenizer, settings.cache, callbacks)

    @property
    def transform(self) -> ImageTransform:
        return self.image.transform

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    @property
    def frozen_image_part(self) -> FrozenTower | FrozenPrefix | None:
        """What may be computed once of the image tower; ``None`` also where ``data.feature_cache`` is off."""
        return self.image.frozen_part

    @property
    def frozen_text_part(self) -> FrozenTower | FrozenPrefix | None:
        """What may be computed once of the text tower; ``None`` also where ``data.feature_cache`` is off."""
        return self.text.frozen_part

    @property
    def both_towers_frozen(self) -> bool:
        """Whether both towers are wholly frozen and cached: a batch is then vectors, which cost nothing to read."""
        return isinstance(self.frozen_image_part, FrozenTower) and isinstance(self.frozen_text_part, FrozenTower)

    # --- training ------------------------------------------------------------------------------------------------

    def batch_reader(self, pairs: Pairs, listing: PairIndex, augment: Augment | None) -> BatchReader:
        """Both sides of training batches; ``listing`` is of ``pairs``."""
        return BatchReader(listing, self.image_reader(pairs, augment), self.text_reader(listing))

    def image_reader(self, pairs: Pairs, augment: Augment | None) -> ImageReader:
        """The image side of training batches. Augmented images are read anew, unless views of them are cached."""
        return self.image.reader(pairs, augment)

    def text_reader(self, listing: PairIndex) -> TextReader:
        """The text side of training batches."""
        return self.text.reader(listing)

    def image_features(self, pairs: Pairs, augment: Augment | None = None) -> CachedFeatures | None:
        """The output of the image tower's frozen part for every image; ``None`` to read them live."""
        return self.image.features(pairs, augment)

    def text_features(self, texts: Sequence[str]) -> CachedFeatures | None:
        """The output of the text tower's frozen part for every text; ``None`` to read them live."""
        return self.text.features(texts)

    # --- evaluation ----------------------------------------------------------------------------------------------

    def images(self, pairs: Pairs) -> Callable[[], ImageStream]:
        """A stream of the images of ``pairs`` with their ids, to be read as often as one likes."""
        return self.image.stream(pairs)

    def texts(self, texts: Mapping[str, str]) -> Callable[[], TextStream]:
        """A stream of captions, given as id to text, to be read as often as one likes."""
        return lambda: self.text.stream(list(texts), list(texts.values()))

    def read(self, texts: Sequence[str]) -> TextStream:
        """A stream of texts that are their own ids (prompts of a zero-shot classifier)."""
        return self.text.stream(list(texts), list(texts))

    def precompute_texts(self, texts: Iterable[str]) -> None:
        """Put the texts of many small requests through a frozen text tower at once; the requests then find them."""
        different = sorted(set(texts))
        if different:
            self.text.features(different)
