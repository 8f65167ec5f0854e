"""Both towers of a model heard on the probes, once for each state they are put in.

In go the pairs to probe with and the ``Inputs`` of a run, out comes what each tower said (``Heard``): as it came
(``before``), as it is (``after``), or part of the way between. Unusual: states that a frozen trunk left in the cache
serve every state of a tower, since the trunk is the same in all of them; a tower in which nothing trains is heard once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from clasp.analysis.tower_features import Said, listen
from clasp.analysis.weight_interpolation import Way
from clasp.data.pairs import Pairs
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import Bar, Inputs
from clasp.models.tower import Tower
from clasp.types import ImageInput, TextInput

Stream = Iterable[tuple[Sequence[str], ImageInput]]

MOST_COMPARED = 1000  # inputs on which the states of blocks are compared


@dataclass(frozen=True, slots=True)
class Heard:
    """What a model's towers said in one state: of the images, of further images to fit on, of the texts."""

    image: Said
    fit: Said | None
    text: Said

    @property
    def to_fit(self) -> Said:
        """Of the images that probes are fitted on: further ones, or a part of ``image``."""
        return self.fit or self.image


@dataclass(kw_only=True)
class Hearing:
    """A run's model, its untuned towers (``base``), and what they are to be heard on.

    ``fit``: pairs to fit on that are not among ``pairs``. ``captions`` are compared state by state, ``prompts`` only
    read. Of images and captions at most ``MOST_COMPARED`` are compared, chosen by a hash of their id or text.
    """

    model: DualEncoder
    base: DualEncoder
    inputs: Inputs
    pairs: Pairs
    fit: Pairs | None
    captions: Sequence[str]
    prompts: Sequence[str]
    bar: Bar
    _streams: dict[int, Callable[[], Stream]] = field(default_factory=dict)

    def before(self) -> Heard:
        """The towers as they came. A learned pooling is the run's: no base has one."""
        self.base.image.pooling, self.base.text.pooling = self.model.image.pooling, self.model.text.pooling
        model = self.model
        image = self._image(model.image if model.image.wholly_frozen else self.base.image, "before")
        return Heard(*image, self._text(model.text if model.text.wholly_frozen else self.base.text, "before"))

    def after(self, before: Heard) -> Heard:
        """The run's towers; what nothing trained in said it ``before``."""
        return self._moved("after", before)

    def between(self, ways: Sequence[Way], alpha: float, before: Heard) -> Heard:
        """The run's towers, each of them ``alpha`` of the way from its base."""
        with ExitStack() as stack:
            for way in ways:
                stack.enter_context(way.at(alpha))
            return self._moved(f"at {alpha:g}", before)

    def _moved(self, state: str, before: Heard) -> Heard:
        image, text = self.model.image, self.model.text
        of_images = (before.image, before.fit) if image.wholly_frozen else self._image(image, state)
        return Heard(*of_images, before.text if text.wholly_frozen else self._text(text, state))

    def _image(self, tower: Tower, state: str) -> tuple[Said, Said | None]:
        ids = [pair.id for pair in self.pairs]
        said = self._hear(tower, self._stream(self.pairs), ids, chosen(ids, MOST_COMPARED), f"images, {state}")
        if self.fit is None:
            return said, None
        ids = [pair.id for pair in self.fit]
        return said, self._hear(tower, self._stream(self.fit), ids, frozenset(), f"images to fit on, {state}")

    def _text(self, tower: Tower, state: str) -> Said:
        texts = sorted({*self.captions, *self.prompts})
        return self._hear(
            tower, self.inputs.read(texts), texts, chosen(self.captions, MOST_COMPARED), f"captions, {state}"
        )

    def _stream(self, pairs: Pairs) -> Stream:
        """Made once for the same pairs: it says once how they are read, and which of them cannot be."""
        if id(pairs) not in self._streams:
            self._streams[id(pairs)] = self.inputs.images(pairs)
        return self._streams[id(pairs)]()

    def _hear(
        self,
        tower: Tower,
        stream: Stream | Iterable[tuple[Sequence[str], TextInput]],
        ids: Sequence[str],
        sample: frozenset[str],
        what: str,
    ) -> Said:
        with self.bar(f"{tower.name}: {what}") as progress:
            return listen(tower, stream, sample, lambda done: progress(done, len(ids)))


def chosen(ids: Iterable[str], most: int) -> frozenset[str]:
    """At most so many of the ids, by a hash of each: the same whatever their order."""

    def rank(id: str) -> bytes:
        return hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()

    return frozenset(sorted(set(ids), key=rank)[:most])
