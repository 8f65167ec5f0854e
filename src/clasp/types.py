"""Shared data types and protocols: pairs, batches, embeddings, encoders, losses, evaluators, trackers and stores.

Everything here is data or a protocol; there is no behaviour. Note: those without tensors are defined in
``clasp.plain_types``, which is imported where there is no torch, and have their names here too.

Shape letters of the project:
``B`` pairs in a batch · ``U`` distinct captions among them · ``N`` tokens · ``D`` width of a tower ·
``E`` joint embedding · ``H`` heads · ``C`` classes · ``K`` neighbours · ``L`` blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from clasp.plain_types import Caption as Caption
from clasp.plain_types import Hit as Hit
from clasp.plain_types import ImageSource as ImageSource
from clasp.plain_types import MessageCallback as MessageCallback
from clasp.plain_types import Pair as Pair
from clasp.plain_types import ProgressCallback as ProgressCallback
from clasp.plain_types import ProgressFactory as ProgressFactory
from clasp.plain_types import SearchModel as SearchModel
from clasp.plain_types import SkippedSample as SkippedSample
from clasp.plain_types import Store as Store
from clasp.plain_types import UserError as UserError
from clasp.plain_types import no_progress as no_progress
from clasp.plain_types import no_progress_bar as no_progress_bar

Modality = Literal["image", "text"]


# --- batches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pixels:
    """Normalised images, the input of an image tower.

    ``contents``: the 64-bit hash of the encoded bytes of each; ``None`` where they are augmented, or given as pixels.
    """

    values: Float[Tensor, "B 3 height width"]
    contents: tuple[int, ...] | None = None

    def select(self, contents: Sequence[int]) -> Pixels:
        """The first image with each of these hashes; itself where these are all, in order."""
        assert self.contents is not None, "pixels that came without hashes"
        if tuple(contents) == self.contents:
            return self
        return Pixels(self.values[[self.contents.index(content) for content in contents]], tuple(contents))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, padded to the longest caption of the batch; ``mask`` is true on real tokens.

    Where captions repeat, each distinct one is stored once, and ``rows`` is the index of each pair's caption.
    """

    ids: Int[Tensor, "U N"]
    mask: Bool[Tensor, "U N"]
    rows: Int[Tensor, " B"] | None = None


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Hidden states after the first ``depth`` blocks of a tower, its frozen prefix, read from the feature cache.

    ``mask`` is true on real tokens. ``size`` is the side in pixels of the input images, 0 for captions. ``rows`` as in
    ``Tokens``.
    """

    values: Float[Tensor, "U N D"]
    mask: Bool[Tensor, "U N"]
    depth: int
    size: int
    rows: Int[Tensor, " B"] | None = None


@dataclass(frozen=True, slots=True)
class PooledFeatures:
    """Pooled output of a frozen tower, read from the feature cache."""

    values: Float[Tensor, "B D"]


ImageInput = Pixels | HiddenStates | PooledFeatures
TextInput = Tokens | HiddenStates | PooledFeatures


@dataclass(frozen=True, slots=True)
class Batch:
    """Aligned images and captions.

    ``groups[:, 0]`` is the index of the pair's group and ``groups[:, 1]`` that of the caption's text: two rows that are
    equal in either column are positives of each other.
    """

    ids: tuple[str, ...]
    image: ImageInput
    text: TextInput
    groups: Int[Tensor, "B 2"]
    skipped: tuple[SkippedSample, ...] = ()
    pairs_of_all: int | None = None
    """Where several processes train, the pairs in the whole batch, of which this is a part"""

    @property
    def total_pairs(self) -> int:
        """Pairs in the whole batch, whose loss a step computes."""
        return len(self.ids) if self.pairs_of_all is None else self.pairs_of_all


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Unit vectors of a batch in the joint space, with logit scale (inverse temperature) and logit bias."""

    image: Float[Tensor, "B E"]
    text: Float[Tensor, "B E"]
    scale: Float[Tensor, ""]
    bias: Float[Tensor, ""] | None = None


# --- contracts -----------------------------------------------------------------------------------------------------


@runtime_checkable
class Encoder(Protocol):
    """Embeds images and texts into one space; the interface that evaluation and search use."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that an embedding depends on."""
        ...

    def encode_image(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E"]: ...

    def encode_text(self, tokens: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B E"]: ...

    def embed_image(self, inputs: ImageInput) -> Float[Tensor, "B E"]:
        """As ``encode_image``, also from cached features."""
        ...

    def embed_text(self, inputs: TextInput) -> Float[Tensor, "B E"]:
        """As ``encode_text``, also from cached features."""
        ...


class LossParts(NamedTuple):
    """A loss and its two directions, each a mean over the batch."""

    total: Float[Tensor, ""]
    image_to_text: Float[Tensor, ""]
    text_to_image: Float[Tensor, ""]


@runtime_checkable
class Loss(Protocol):
    """A contrastive loss of the embeddings of a batch; pure. ``scale`` and ``bias``: of the logits."""

    def __call__(
        self,
        image: Float[Tensor, "B E"],
        text: Float[Tensor, "B E"],
        scale: Float[Tensor, ""],
        bias: Float[Tensor, ""] | None = None,
        *,
        groups: Int[Tensor, "B 2"] | None = None,
    ) -> LossParts: ...


@runtime_checkable
class Evaluator(Protocol):
    """Evaluates an encoder; returns metrics by name. ``primary`` names the metric that models are selected by."""

    @property
    def name(self) -> str: ...

    @property
    def primary(self) -> str: ...

    def __call__(self, encoder: Encoder) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The run that a tracker is created for: its folder, whose name is the run's, and the steps done when it is resumed
    (0 for a new run)."""

    folder: Path
    step: int = 0


@runtime_checkable
class Tracker(Protocol):
    """Records the metrics of a run; a tracker class is constructed with a ``TrackedRun``.

    Names with a slash are metrics (``train/loss``, ``validation/recall@1``); those without are fields of the ``event``
    in the same call. ``config`` is called first and once, ``finish`` last.
    """

    def config(self, recipe: dict[str, Any]) -> None:
        """Starts the record; an exception here ends the run before any compute."""
        ...

    def log(self, metrics: Mapping[str, float | str | int], step: int) -> None:
        """Records metrics after ``step`` steps of training."""
        ...

    def finish(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Records the final results, as in ``results.jsonl``, and ends the record; none after an interruption."""
        ...
