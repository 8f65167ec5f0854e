"""The words of the house: what a pair, a batch and an embedding are, and the contracts between rooms.

Everything here is data or a protocol; there is no behaviour and nothing is imported from the rest of clasp.

Shape letters, one legend for the project:
``B`` pairs in a batch · ``U`` different captions among them · ``N`` tokens · ``D`` width of a tower ·
``E`` joint embedding · ``H`` heads · ``C`` classes · ``K`` neighbours · ``L`` blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


class UserError(ValueError):
    """A mistake in what the user gave us: one line that restates the input and names the valid choices.

    The command prints the line alone and exits with code 2; nothing has been computed and nothing is lost.
    """


Modality = Literal["image", "text"]
MessageCallback = Callable[[str], None]
"""Gets a line that a person should read"""
ProgressCallback = Callable[[int, int], None]
"""Gets how many are done, and of how many"""
ProgressFactory = Callable[[str], AbstractContextManager[ProgressCallback]]
"""Opens a progress bar with a title"""


# --- pairs ---------------------------------------------------------------------------------------------------------


class Caption(NamedTuple):
    """One caption and the language it is in (a BCP 47 tag such as ``sw``; empty when unknown)."""

    text: str
    language: str = ""


@runtime_checkable
class ImageSource(Protocol):
    """Where the bytes of one image are: a file, a stretch of a tar, a cell of a table."""

    @property
    def name(self) -> str:
        """What a person would look for: a path, or ``shard.tar::member.jpg``."""
        ...

    @property
    def version(self) -> str:
        """Changes when the bytes may have changed (size and time of the file, offset in the tar)."""
        ...

    def read(self) -> bytes:
        """The encoded image."""
        ...


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its captions.

    ``id`` is stable: it does not depend on the order of reading and survives to the search hit.
    Pairs of one ``group`` show the same thing (by default a pair is its own group): they are never each
    other's negatives, and a validation split never separates them.
    """

    id: str
    image: ImageSource
    captions: tuple[Caption, ...]
    group: str
    meta: Mapping[str, Any] = field(default_factory=dict)


# --- batches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pixels:
    """Normalised images, as an image tower wants them."""

    values: Float[Tensor, "B 3 height width"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, padded to the longest caption of the batch; ``mask`` is true on real tokens.

    Where captions repeat, each different one is held once, and ``rows`` says which of them a pair has.
    """

    ids: Int[Tensor, "U N"]
    mask: Bool[Tensor, "U N"]
    rows: Int[Tensor, " B"] | None = None


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Where a tower's trunk left its inputs, taken from the feature cache: the states after its first ``depth`` blocks.

    ``mask`` is true on real tokens. ``size`` is the side in pixels of the images that were read, 0 for captions.
    ``rows`` is that of ``Tokens``.
    """

    values: Float[Tensor, "U N D"]
    mask: Bool[Tensor, "U N"]
    depth: int
    size: int
    rows: Int[Tensor, " B"] | None = None


@dataclass(frozen=True, slots=True)
class PooledFeatures:
    """What a frozen tower has already said of its input: its pooled output, taken from the feature cache."""

    values: Float[Tensor, "B D"]


ImageInput = Pixels | HiddenStates | PooledFeatures
TextInput = Tokens | HiddenStates | PooledFeatures


class SkippedSample(NamedTuple):
    """A sample that could not be read, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Aligned images and captions.

    ``groups[:, 0]`` numbers the pair's group and ``groups[:, 1]`` the caption's text: two rows that agree in
    either column are positives of each other.
    """

    ids: tuple[str, ...]
    image: ImageInput
    text: TextInput
    groups: Int[Tensor, "B 2"]
    skipped: tuple[SkippedSample, ...] = ()


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Unit vectors of a batch in the joint space, with the scale and bias of its logits."""

    image: Float[Tensor, "B E"]
    text: Float[Tensor, "B E"]
    scale: Float[Tensor, ""]
    bias: Float[Tensor, ""] | None = None


# --- contracts -----------------------------------------------------------------------------------------------------


@runtime_checkable
class Encoder(Protocol):
    """Anything that puts images and texts into one space; all evaluation and search stand on this."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Changes with anything that an embedding depends on."""
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
    """Embeddings of a batch to a number; pure."""

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
    """Asks one question of an encoder. ``primary`` names the answer that decides between two models."""

    @property
    def name(self) -> str: ...

    @property
    def primary(self) -> str: ...

    def __call__(self, encoder: Encoder) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The run that a tracker is made for: its folder, whose name is the run's, and the steps done when it goes on
    (0 for a run that begins)."""

    folder: Path
    step: int = 0


@runtime_checkable
class Tracker(Protocol):
    """Records the numbers of a run; ``TrackedRun`` is all that a class of trackers is called with.

    Names with a slash are metrics (``train/loss``, ``validation/recall@1``); those without describe the ``event`` that
    they came with. ``config`` comes first and once, ``finish`` last.
    """

    def config(self, recipe: dict[str, Any]) -> None:
        """Starts the record; an exception here ends the run before any compute."""
        ...

    def log(self, metrics: Mapping[str, float | str | int], step: int) -> None:
        """Records metrics after ``step`` steps of training."""
        ...

    def finish(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Records the final results, as in ``results.jsonl``, and ends the record; none where the run was stopped."""
        ...


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result; ``score`` is a cosine."""

    id: str
    score: float
    meta: Mapping[str, Any]


@runtime_checkable
class Store(Protocol):
    """Vectors with ids and metadata; knows no model."""

    def add(self, ids: Sequence[str], vectors: Float[Tensor, "n E"], meta: Sequence[Mapping[str, Any]]) -> None: ...

    def delete(self, ids: Iterable[str]) -> int: ...

    def search(
        self,
        queries: Float[Tensor, "q E"],
        k: int,
        where: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> list[list[Hit]]: ...

    def count(self) -> int: ...

    def close(self) -> None: ...


def no_progress_bar(title: str) -> AbstractContextManager[ProgressCallback]:
    """A ``ProgressFactory`` that shows nothing."""
    return nullcontext(lambda done, total: None)
