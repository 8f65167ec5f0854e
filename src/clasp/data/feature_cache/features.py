"""What the frozen part of a tower says, computed once, kept on disk, replayed as one side of a batch.

In: a frozen part (``Frozen``) and the images or captions it shall see. Out: ``Features``, memory-mapped rows under a
key of all that decides them: weights, transform or tokenizer, pairs or texts, augmentation, storage. An item has one
row where the part pools, a row a token where it stops at a block. Unusual: a caption is encoded once however often it
repeats, longest first; an image may have several augmented views; an unreadable image has NaN rows, is named in the
file and skipped at replay; a build that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.data.feature_cache.arrays import Kept, Writer, cached
from clasp.data.feature_cache.dtypes import STORAGES, Name
from clasp.data.images import Augment, ImageTransform
from clasp.data.loader import Tally, draws, text_batches
from clasp.data.pairs import Pairs
from clasp.data.readers import ImageRows, Listing, LiveImages, Picks, TextRows
from clasp.data.tokenizer import Tokenizer
from clasp.data.workers import Stream
from clasp.types import Pair, Pixels, Pooled, Skipped, States, Tokens

Progress = Callable[[int, int], None]
Inputs = TypeVar("Inputs", contravariant=True)

_VIEW = 3  # what a stream of random numbers is for; the first three are those of ``batches``
ENCODED_AT_ONCE = 4096  # tokens of captions in one call of a tower


@runtime_checkable
class Frozen(Protocol[Inputs]):
    """The part of a tower that stays as it is: its trunk up to a block, or all of it and its pooling."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the part could answer differently: with the weights, the pooling, the block."""
        ...

    @property
    def depth(self) -> int:
        """How many blocks it runs; 0 when it is the whole tower, which pools."""
        ...

    @property
    def width(self) -> int:
        """``D`` of what it says."""
        ...

    @property
    def tokens(self) -> int:
        """Rows that an image takes: ``N`` of its states, or 1 where it pools. A caption has its own length."""
        ...

    def __call__(self, inputs: Inputs) -> States | Pooled: ...


@dataclass(frozen=True, eq=False)
class Features:
    """Rows on disk, and which of them belong to which item (pair or text) they were asked for."""

    kept: Kept
    """Of each entry the rows of its views, view 0 being the plain one. Its ``about`` is what the ``.json`` says."""
    entry: Int[np.ndarray, " items"]
    """Which entry each item is."""
    first: Int[np.ndarray, " bounds"]
    """Where the rows of each view of each entry begin, and where the last ones end."""
    views: int = 1
    """How many times each item was encoded."""

    def __len__(self) -> int:
        return len(self.entry)

    @cached_property
    def skipped(self) -> dict[int, Skipped]:
        """Item -> why it has no features."""
        return {item: Skipped(name, reason) for item, name, reason in self.kept.about["skipped"]}

    def read(self, items: Int[np.ndarray, " B"], view: Int[np.ndarray, " B"] | int = 0) -> Pooled | States:
        """A copy in memory of what was said of ``items``, each in its ``view``; captions padded to the longest."""
        at = self.entry[items] * self.views + view
        depth = self.kept.about["depth"]
        if depth == 0:
            return Pooled(self.kept.take(self.first[at]).float())
        lengths = self.first[at + 1] - self.first[at]
        place = np.arange(int(lengths.max()))
        mask = place < lengths[:, None]
        # padding repeats the last real token: no mask lets anything see it
        rows = self.first[at][:, None] + np.minimum(place, lengths[:, None] - 1)
        return States(self.kept.take(rows), torch.from_numpy(mask), depth, self.kept.about["size"])


# --- by what features are known --------------------------------------------------------------------------------------


class Texts:
    """Which ``entry`` each text is among the ``different`` ones, and the ``version`` of these.

    They are sorted, so that their order in the data is of no account.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.different = sorted(set(texts))
        entry = {text: number for number, text in enumerate(self.different)}
        self.entry = np.array([entry[text] for text in texts], dtype=np.int64)
        self.version = hashlib.sha256(json.dumps(self.different).encode()).hexdigest()


def key_of_images(
    part: Frozen[Pixels], pairs: Pairs, transform: ImageTransform, augment: Augment | None, *, views: int, seed: int
) -> dict[str, Any]:
    """Of the features of images: changes with whatever could change one of them. The plain view has no seed."""
    key = {"what": "images", "part": part.fingerprint, "transform": transform.fingerprint}
    key |= {"pairs": pairs.version, "views": views}
    return key if augment is None or views == 1 else key | {"augment": asdict(augment), "seed": seed}


def key_of_texts(part: Frozen[Tokens], tokenizer: Tokenizer, texts: Texts) -> dict[str, Any]:
    """Of the features of texts."""
    key = {"what": "texts", "part": part.fingerprint, "tokenizer": tokenizer.fingerprint}
    return key | {"texts": texts.version}


# --- replay ----------------------------------------------------------------------------------------------------------


class CachedImages:
    """An image side that looks rows up; the views of an image take turns by the seed of the pick.

    ``pairs`` are those of the batch. Raises ``ValueError`` when the features are of other pairs.
    """

    def __init__(self, features: Features, pairs: Pairs) -> None:
        if features.kept.about["key"].get("pairs") != pairs.version:
            raise ValueError(f"{features.kept.path} holds features of other pairs than these")
        self._features = features

    def __call__(self, picks: Picks, read: Callable[[int], Pair]) -> ImageRows:
        features, numbers = self._features, picks.pair.tolist()
        skipped = tuple(features.skipped[number] for number in numbers if number in features.skipped)
        kept = [place for place, number in enumerate(numbers) if number not in features.skipped]
        picks = picks[kept] if skipped else picks
        return ImageRows(features.read(picks.pair, picks.seed % features.views), kept, skipped)


class CachedTexts:
    """A text side that looks rows up: ``listing`` is of the pairs of the batch.

    Raises ``ValueError`` when the features are not of exactly the texts in ``listing``.
    """

    def __init__(self, features: Features, listing: Listing) -> None:
        texts = Texts(listing.texts)
        if features.kept.about["key"].get("texts") != texts.version:
            raise ValueError(f"{features.kept.path} holds features of other texts than these")
        # its own index: the texts may have been asked for in another order
        self._features = replace(features, entry=texts.entry)
        self._listing = listing

    def __call__(self, picks: Picks, read: Callable[[int], Pair]) -> TextRows:
        texts = self._listing.caption_of(picks)
        if self._features.kept.about["depth"] == 0:
            return TextRows(self._features.read(texts), texts.tolist())
        different, rows = np.unique(texts, return_inverse=True)  # blocks are still to be run: once for each
        states = self._features.read(different)
        assert isinstance(states, States)
        return TextRows(replace(states, rows=torch.from_numpy(rows)), texts.tolist())


# --- computing, once -------------------------------------------------------------------------------------------------


def image_features(
    part: Frozen[Pixels],
    pairs: Pairs,
    transform: ImageTransform,
    *,
    batch: int,
    cache: Path,
    progress: Progress | None = None,
    augment: Augment | None = None,
    views: int = 1,
    seed: int = 0,
    workers: int = 0,
    device: str | torch.device = "cpu",
    max_bad_fraction: float = 0.02,
    storage: Name = "float32",
) -> Features:
    """The features of every image, entry i those of pair i, in ``views`` views: the plain one, then augmented ones.

    ``progress(done, total)`` counts images times views, and is not called when nothing is computed. ``device`` is
    where the tower is. Raises ``UserError`` when too many images are unreadable or the disk is full.
    """
    assert views == 1 or augment is not None, "further views need an augmentation"
    key = key_of_images(part, pairs, transform, augment, views=views, seed=seed)
    count, rows = len(pairs), part.tokens
    place = np.arange(rows)

    def fill(writer: Writer) -> None:
        writer.notes = {"skipped": [], **writer.notes, "depth": part.depth, "size": transform.size}
        tally = Tally(count, max_bad_fraction)
        skipped: dict[int, Skipped] = {number: Skipped(name, why) for number, name, why in writer.notes["skipped"]}
        tally.add(skipped.values())
        sides = [LiveImages(transform), *[LiveImages(transform, augment)] * (views - 1)]
        asks, done = _views(count, batch, views, seed, start=writer.done), writer.done
        with closing(Stream(_ViewReader(pairs, sides), workers=workers)) as stream:
            for (view, picks), images in zip(asks, stream(asks), strict=True):
                tally.add(images.skipped)
                missing = sorted(set(range(len(picks))) - set(images.kept))
                skipped.update(zip(picks.pair[missing].tolist(), images.skipped, strict=True))
                values = torch.full((len(picks), rows, part.width), torch.nan)
                if images.kept:
                    values[images.kept] = _on_cpu(part(Pixels(images.inputs.values.to(device)))).unflatten(
                        0, (len(images.kept), rows)
                    )
                at = (picks.pair * views + view)[:, None] * rows + place
                writer.write(at.reshape(-1), values.flatten(0, 1))
                done += len(picks)
                writer.notes["skipped"] = [[number, *skipped[number]] for number in sorted(skipped)]
                writer.mark(done)
                if progress is not None:
                    progress(done, count * views)

    shape = (count * views * rows, part.width)
    with torch.inference_mode():
        kept = cached(cache / "features", key, shape, fill, storage=storage)
    return Features(kept, np.arange(count), np.arange(count * views + 1) * rows, views)


def text_features(
    part: Frozen[Tokens],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    cache: Path,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
    storage: Name = "float32",
) -> Features:
    """The features of every text; those that repeat are encoded once. The order of ``texts`` is not part of the key.

    ``progress(done, total)`` counts different texts, and is not called when nothing is computed. ``device`` is where
    the tower is. Raises ``UserError`` when the disk is full.
    """
    asked = Texts(texts)
    count = len(asked.different)
    key = key_of_texts(part, tokenizer, asked)
    if part.depth == 0:
        first = np.arange(count + 1)
    else:
        first = np.cumsum([0, *map(len, tokenizer.encode(asked.different))])

    def fill(writer: Writer) -> None:
        writer.notes = {"skipped": [], "depth": part.depth, "size": 0}
        done = 0
        for places, tokens in text_batches(asked.different, tokenizer, ENCODED_AT_ONCE):
            done += len(places)
            if done <= writer.done:
                continue
            values = _on_cpu(part(Tokens(tokens.ids.to(device), tokens.mask.to(device))), tokens.mask)
            at = [np.arange(first[place], first[place + 1]) for place in places]
            writer.write(np.concatenate(at), values)
            writer.mark(done)
            if progress is not None:
                progress(done, count)

    with torch.inference_mode():
        kept = cached(cache / "features", key, (int(first[-1]), part.width), fill, storage=storage)
    return Features(kept, asked.entry, first)


def bytes_of_images(part: Frozen[Pixels], count: int, views: int, storage: Name) -> int:
    """What ``image_features`` of ``count`` images will take on disk."""
    return STORAGES[storage].bytes_of(count * views * part.tokens, part.width)


def bytes_of_texts(part: Frozen[Tokens], tokenizer: Tokenizer, texts: Sequence[str], storage: Name) -> int:
    """What ``text_features`` of ``texts`` will take on disk."""
    different = sorted(set(texts))
    rows = len(different) if part.depth == 0 else sum(map(len, tokenizer.encode(different)))
    return STORAGES[storage].bytes_of(rows, part.width)


def _on_cpu(said: States | Pooled, mask: Tensor | None = None) -> Float[Tensor, "rows D"]:
    """What a part said, one row a token or a vector; only the tokens in ``mask``, where one is given."""
    values = said.values.float().cpu()
    if isinstance(said, Pooled):
        return values
    return values.flatten(0, 1) if mask is None else values[mask]


@dataclass(frozen=True, slots=True)
class _ViewReader:
    """One view of some images; runs in a worker where there are any."""

    pairs: Pairs
    sides: Sequence[LiveImages]

    def __call__(self, ask: tuple[int, Picks]) -> ImageRows:
        view, picks = ask
        return self.sides[view](picks, self.pairs.__getitem__)


def _views(count: int, batch: int, views: int, seed: int, *, start: int) -> list[tuple[int, Picks]]:
    """Every image in every view, a batch at a time; all views of some images, then the next images.

    ``start`` images times views are left out: they have been done.
    """
    order = np.arange(count)
    all_ = [Picks(order, np.zeros_like(order), draws((seed, view, _VIEW), count)) for view in range(views)]
    asks = [(view, all_[view][at : at + batch]) for at in range(0, count, batch) for view in range(views)]
    done = np.cumsum([len(picks) for _, picks in asks])
    return [ask for ask, end in zip(asks, done, strict=True) if end > start]
