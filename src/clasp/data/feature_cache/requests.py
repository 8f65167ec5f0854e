"""Feature requests: the inputs of a frozen part of a tower, and the cache key of its output.

Input: a frozen part (``FrozenPart``) with images or texts. Output: the key of their features (all that determines them
but the storage dtype), their count, and their bytes on disk. Note: nothing is encoded here and no image is read; texts
are tokenised if the part stops at a block, since a caption then takes a row per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int

from clasp.data.feature_cache.dtypes import DTYPE_CODECS
from clasp.data.images import Augment, ImageTransform
from clasp.data.pairs import Pairs
from clasp.data.text_column import TextColumn
from clasp.data.tokenizer import Tokenizer
from clasp.plain_types import StorageDtype
from clasp.types import HiddenStates, Pixels, PooledFeatures, Tokens

_TowerInput_contra = TypeVar("_TowerInput_contra", contravariant=True)


@runtime_checkable
class FrozenPart(Protocol[_TowerInput_contra]):
    """The frozen part of a tower: its first blocks (a frozen prefix), or the whole tower with pooling."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the output of a layer could: with the weights, the pooling or the depth."""
        ...

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(block, width) of every layer that is pooled, in the order of its columns, the last block first; empty for a
        frozen prefix."""
        ...

    @property
    def depth(self) -> int:
        """Number of blocks of a frozen prefix; 0 for the whole tower, which pools."""
        ...

    @property
    def width(self) -> int:
        """``D``, the dimension of its output."""
        ...

    @property
    def tokens(self) -> int:
        """Rows per image: ``N`` hidden states, or 1 if it pools. A caption has as many as it has tokens."""
        ...

    def __call__(self, inputs: _TowerInput_contra) -> HiddenStates | PooledFeatures: ...


class DistinctTexts:
    """The ``distinct`` texts, the ``entry`` of each text among them, and their ``version`` (a hash).

    The distinct texts are sorted, so their order in the data does not matter.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.distinct, self.entry = TextColumn.of(texts).sort_distinct()

    @cached_property
    def version(self) -> str:
        digest = hashlib.sha256()
        for piece in self.distinct.json_pieces():
            digest.update(piece)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageFeatureRequest:
    """The images of ``pairs`` through ``part``, each once, in ``views`` views: one plain, the others augmented."""

    what: ClassVar[Literal["images"]] = "images"
    part: FrozenPart[Pixels]
    pairs: Pairs
    transform: ImageTransform
    augment: Augment | None = None
    views: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.views == 1 or self.augment is not None, "further views need an augmentation"

    @property
    def key(self) -> dict[str, Any]:
        """Changes whenever a feature could, hence with the attention kernel. The plain view does not depend on
        ``seed``."""
        key = {"what": "images", "part": self.part.fingerprint, "transform": self.transform.fingerprint}
        key |= {"pairs": self.pairs.images.pairs.version, "views": self.views, **_layers_key(self.part.layers)}
        if self.augment is None or self.views == 1:
            return key
        return key | {"augment": asdict(self.augment), "seed": self.seed}

    @property
    def count(self) -> int:
        """Number of distinct images."""
        return len(self.pairs.images.pairs)

    @property
    def rows(self) -> int:
        """Rows of all views of all distinct images."""
        return self.count * self.views * self.part.tokens

    def num_bytes(self, storage: StorageDtype) -> int:
        """Bytes of the features on disk."""
        return DTYPE_CODECS[storage].num_bytes(self.rows, self.part.width)


@dataclass(frozen=True, eq=False)
class TextFeatureRequest:
    """``texts`` through ``part``, each distinct text once."""

    what: ClassVar[Literal["captions"]] = "captions"
    part: FrozenPart[Tokens]
    tokenizer: Tokenizer
    texts: Sequence[str]

    @cached_property
    def index(self) -> DistinctTexts:
        """The distinct texts."""
        return DistinctTexts(self.texts)

    @property
    def key(self) -> dict[str, Any]:
        """Changes whenever a feature could, hence with the attention kernel; does not depend on the order of the
        texts."""
        key = {"what": "texts", "part": self.part.fingerprint, "tokenizer": self.tokenizer.fingerprint}
        return key | {"texts": self.index.version, **_layers_key(self.part.layers)}

    @property
    def count(self) -> int:
        """Number of distinct texts."""
        return len(self.index.distinct)

    @cached_property
    def offsets(self) -> Int[np.ndarray, " bounds"]:
        """First row of each distinct text, and the end of the last."""
        if self.part.depth == 0:
            return np.arange(self.count + 1)
        return np.cumsum([0, *map(len, self.tokenizer.encode(self.index.distinct))])

    @property
    def rows(self) -> int:
        """Rows of all distinct texts."""
        return int(self.offsets[-1])

    def num_bytes(self, storage: StorageDtype) -> int:
        """Bytes of the features on disk."""
        return DTYPE_CODECS[storage].num_bytes(self.rows, self.part.width)


def _layers_key(layers: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    return {"layers": [list(layer) for layer in layers]} if len(layers) > 1 else {}


FeatureRequest = ImageFeatureRequest | TextFeatureRequest
