"""What the frozen part of a tower says, computed once, kept on disk, replayed as one side of a batch.

In: a frozen part (``FrozenPart``) and the images or captions it shall see. Out: ``CachedFeatures``, memory-mapped rows
under a key of all that decides them: weights, transform or tokenizer, pairs or texts, augmentation, storage. An item
has one row where the part pools, a row a token where it stops at a block. Unusual: a caption is encoded once however
often it repeats, longest first; an image may have several augmented views; an unreadable image has NaN rows, is named
in the file and skipped at replay; a build that was killed goes on where it stopped.
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

from clasp.data.feature_cache.arrays import ArrayWriter, CachedArray, load_or_compute
from clasp.data.feature_cache.dtypes import DTYPE_CODECS, StorageDtype
from clasp.data.images import Augment, ImageTransform
from clasp.data.loader import BadSampleLimit, iter_text_batches, philox_integers
from clasp.data.pairs import Pairs
from clasp.data.readers import ImageBatch, LiveImageReader, PairIndex, SampleIndices, TextBatch
from clasp.data.tokenizer import Tokenizer
from clasp.data.workers import WorkerPool
from clasp.types import HiddenStates, Pair, Pixels, PooledFeatures, ProgressCallback, SkippedSample, Tokens

_TowerInput_contra = TypeVar("_TowerInput_contra", contravariant=True)

_VIEW_STREAM = 3  # what a stream of random numbers is for; the first three are those of ``batches``
TOKENS_PER_FORWARD = 4096  # tokens of captions in one call of a tower


@runtime_checkable
class FrozenPart(Protocol[_TowerInput_contra]):
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

    def __call__(self, inputs: _TowerInput_contra) -> HiddenStates | PooledFeatures: ...


@dataclass(frozen=True, eq=False)
class CachedFeatures:
    """Rows on disk, and which of them belong to which item (pair or text) they were asked for."""

    kept: CachedArray
    """Of each entry the rows of its views, view 0 being the plain one. Its ``about`` is what the ``.json`` says."""
    entry: Int[np.ndarray, " items"]
    """Which entry each item is."""
    offsets: Int[np.ndarray, " bounds"]
    """Where the rows of each view of each entry begin, and where the last ones end."""
    views: int = 1
    """How many times each item was encoded."""

    def __len__(self) -> int:
        return len(self.entry)

    @cached_property
    def skipped(self) -> dict[int, SkippedSample]:
        """Item -> why it has no features."""
        return {item: SkippedSample(name, reason) for item, name, reason in self.kept.metadata["skipped"]}

    def read(
        self, items: Int[np.ndarray, " B"], view: Int[np.ndarray, " B"] | int = 0
    ) -> PooledFeatures | HiddenStates:
        """A copy in memory of what was said of ``items``, each in its ``view``; captions padded to the longest."""
        at = self.entry[items] * self.views + view
        depth = self.kept.metadata["depth"]
        if depth == 0:
            return PooledFeatures(self.kept.take(self.offsets[at]).float())
        lengths = self.offsets[at + 1] - self.offsets[at]
        place = np.arange(int(lengths.max()))
        mask = place < lengths[:, None]
        # padding repeats the last real token: no mask lets anything see it
        rows = self.offsets[at][:, None] + np.minimum(place, lengths[:, None] - 1)
        return HiddenStates(self.kept.take(rows), torch.from_numpy(mask), depth, self.kept.metadata["size"])


# --- by what features are known --------------------------------------------------------------------------------------


class DistinctTexts:
    """Which ``entry`` each text is among the ``distinct`` ones, and the ``version`` of these.

    They are sorted, so that their order in the data is of no account.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.distinct = sorted(set(texts))
        entry = {text: number for number, text in enumerate(self.distinct)}
        self.entry = np.array([entry[text] for text in texts], dtype=np.int64)
        self.version = hashlib.sha256(json.dumps(self.distinct).encode()).hexdigest()


def image_cache_key(
    part: FrozenPart[Pixels], pairs: Pairs, transform: ImageTransform, augment: Augment | None, *, views: int, seed: int
) -> dict[str, Any]:
    """Of the features of images: changes with whatever could change one of them. The plain view has no seed."""
    key = {"what": "images", "part": part.fingerprint, "transform": transform.fingerprint}
    key |= {"pairs": pairs.version, "views": views}
    return key if augment is None or views == 1 else key | {"augment": asdict(augment), "seed": seed}


def text_cache_key(part: FrozenPart[Tokens], tokenizer: Tokenizer, texts: DistinctTexts) -> dict[str, Any]:
    """Of the features of texts."""
    key = {"what": "texts", "part": part.fingerprint, "tokenizer": tokenizer.fingerprint}
    return key | {"texts": texts.version}


# --- replay ----------------------------------------------------------------------------------------------------------


class CachedImageReader:
    """An image side that looks rows up; the views of an image take turns by the seed of the pick.

    ``pairs`` are those of the batch. Raises ``ValueError`` when the features are of other pairs.
    """

    def __init__(self, features: CachedFeatures, pairs: Pairs) -> None:
        if features.kept.metadata["key"].get("pairs") != pairs.version:
            raise ValueError(f"{features.kept.path} holds features of other pairs than these")
        self._features = features

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> ImageBatch:
        features, numbers = self._features, indices.pair.tolist()
        skipped = tuple(features.skipped[number] for number in numbers if number in features.skipped)
        kept = [place for place, number in enumerate(numbers) if number not in features.skipped]
        indices = indices[kept] if skipped else indices
        return ImageBatch(features.read(indices.pair, indices.seed % features.views), kept, skipped)


class CachedTextReader:
    """A text side that looks rows up: ``listing`` is of the pairs of the batch.

    Raises ``ValueError`` when the features are not of exactly the texts in ``listing``.
    """

    def __init__(self, features: CachedFeatures, listing: PairIndex) -> None:
        texts = DistinctTexts(listing.texts)
        if features.kept.metadata["key"].get("texts") != texts.version:
            raise ValueError(f"{features.kept.path} holds features of other texts than these")
        # its own index: the texts may have been asked for in another order
        self._features = replace(features, entry=texts.entry)
        self._listing = listing

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> TextBatch:
        texts = self._listing.text_indices(indices)
        if self._features.kept.metadata["depth"] == 0:
            return TextBatch(self._features.read(texts), texts.tolist())
        different, rows = np.unique(texts, return_inverse=True)  # blocks are still to be run: once for each
        states = self._features.read(different)
        assert isinstance(states, HiddenStates)
        return TextBatch(replace(states, rows=torch.from_numpy(rows)), texts.tolist())


# --- computing, once -------------------------------------------------------------------------------------------------


def image_features(
    part: FrozenPart[Pixels],
    pairs: Pairs,
    transform: ImageTransform,
    *,
    batch_size: int,
    cache_folder: Path,
    progress: ProgressCallback | None = None,
    augment: Augment | None = None,
    views: int = 1,
    seed: int = 0,
    workers: int = 0,
    device: str | torch.device = "cpu",
    max_bad_fraction: float = 0.02,
    storage: StorageDtype = "float32",
) -> CachedFeatures:
    """The features of every image, entry i those of pair i, in ``views`` views: the plain one, then augmented ones.

    ``progress(done, total)`` counts images times views, and is not called when nothing is computed. ``device`` is
    where the tower is. Raises ``UserError`` when too many images are unreadable or the disk is full.
    """
    assert views == 1 or augment is not None, "further views need an augmentation"
    key = image_cache_key(part, pairs, transform, augment, views=views, seed=seed)
    count, rows = len(pairs), part.tokens
    place = np.arange(rows)

    def fill(writer: ArrayWriter) -> None:
        writer.notes = {"skipped": [], **writer.notes, "depth": part.depth, "size": transform.size}
        tally = BadSampleLimit(count, max_bad_fraction)
        skipped: dict[int, SkippedSample] = {
            number: SkippedSample(name, why) for number, name, why in writer.notes["skipped"]
        }
        tally.add(skipped.values())
        sides = [LiveImageReader(transform), *[LiveImageReader(transform, augment)] * (views - 1)]
        asks, done = _view_batches(count, batch_size, views, seed, start=writer.done), writer.done
        with closing(WorkerPool(_ViewReader(pairs, sides), workers=workers)) as stream:
            for (view, picks), images in zip(asks, stream(asks), strict=True):
                tally.add(images.skipped)
                missing = sorted(set(range(len(picks))) - set(images.kept))
                skipped.update(zip(picks.pair[missing].tolist(), images.skipped, strict=True))
                values = torch.full((len(picks), rows, part.width), torch.nan)
                if images.kept:
                    values[images.kept] = _rows_on_cpu(part(Pixels(images.inputs.values.to(device)))).unflatten(
                        0, (len(images.kept), rows)
                    )
                at = (picks.pair * views + view)[:, None] * rows + place
                writer.write(at.reshape(-1), values.flatten(0, 1))
                done += len(picks)
                writer.notes["skipped"] = [[number, *skipped[number]] for number in sorted(skipped)]
                writer.save_progress(done)
                if progress is not None:
                    progress(done, count * views)

    shape = (count * views * rows, part.width)
    with torch.inference_mode():
        kept = load_or_compute(cache_folder / "features", key, shape, fill, storage=storage)
    return CachedFeatures(kept, np.arange(count), np.arange(count * views + 1) * rows, views)


def text_features(
    part: FrozenPart[Tokens],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    cache_folder: Path,
    progress: ProgressCallback | None = None,
    device: str | torch.device = "cpu",
    storage: StorageDtype = "float32",
) -> CachedFeatures:
    """The features of every text; those that repeat are encoded once. The order of ``texts`` is not part of the key.

    ``progress(done, total)`` counts different texts, and is not called when nothing is computed. ``device`` is where
    the tower is. Raises ``UserError`` when the disk is full.
    """
    asked = DistinctTexts(texts)
    count = len(asked.distinct)
    key = text_cache_key(part, tokenizer, asked)
    if part.depth == 0:
        first = np.arange(count + 1)
    else:
        first = np.cumsum([0, *map(len, tokenizer.encode(asked.distinct))])

    def fill(writer: ArrayWriter) -> None:
        writer.notes = {"skipped": [], "depth": part.depth, "size": 0}
        done = 0
        for places, tokens in iter_text_batches(asked.distinct, tokenizer, TOKENS_PER_FORWARD):
            done += len(places)
            if done <= writer.done:
                continue
            values = _rows_on_cpu(part(Tokens(tokens.ids.to(device), tokens.mask.to(device))), tokens.mask)
            at = [np.arange(first[place], first[place + 1]) for place in places]
            writer.write(np.concatenate(at), values)
            writer.save_progress(done)
            if progress is not None:
                progress(done, count)

    with torch.inference_mode():
        kept = load_or_compute(cache_folder / "features", key, (int(first[-1]), part.width), fill, storage=storage)
    return CachedFeatures(kept, asked.entry, first)


def image_cache_bytes(part: FrozenPart[Pixels], count: int, views: int, storage: StorageDtype) -> int:
    """What ``image_features`` of ``count`` images will take on disk."""
    return DTYPE_CODECS[storage].num_bytes(count * views * part.tokens, part.width)


def text_cache_bytes(
    part: FrozenPart[Tokens], tokenizer: Tokenizer, texts: Sequence[str], storage: StorageDtype
) -> int:
    """What ``text_features`` of ``texts`` will take on disk."""
    different = sorted(set(texts))
    rows = len(different) if part.depth == 0 else sum(map(len, tokenizer.encode(different)))
    return DTYPE_CODECS[storage].num_bytes(rows, part.width)


def _rows_on_cpu(features: HiddenStates | PooledFeatures, mask: Tensor | None = None) -> Float[Tensor, "rows D"]:
    """What a part said, one row a token or a vector; only the tokens in ``mask``, where one is given."""
    values = features.values.float().cpu()
    if isinstance(features, PooledFeatures):
        return values
    return values.flatten(0, 1) if mask is None else values[mask]


@dataclass(frozen=True, slots=True)
class _ViewReader:
    """One view of some images; runs in a worker where there are any."""

    pairs: Pairs
    sides: Sequence[LiveImageReader]

    def __call__(self, ask: tuple[int, SampleIndices]) -> ImageBatch:
        view, picks = ask
        return self.sides[view](picks, self.pairs.__getitem__)


def _view_batches(count: int, batch: int, views: int, seed: int, *, start: int) -> list[tuple[int, SampleIndices]]:
    """Every image in every view, a batch at a time; all views of some images, then the next images.

    ``start`` images times views are left out: they have been done.
    """
    order = np.arange(count)
    all_ = [
        SampleIndices(order, np.zeros_like(order), philox_integers((seed, view, _VIEW_STREAM), count))
        for view in range(views)
    ]
    asks = [(view, all_[view][at : at + batch]) for at in range(0, count, batch) for view in range(views)]
    done = np.cumsum([len(picks) for _, picks in asks])
    return [ask for ask, end in zip(asks, done, strict=True) if end > start]
