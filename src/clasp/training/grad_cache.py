"""The exact gradient of a batch whose activations do not fit in memory, by gradient caching.

In: a model that embeds either side by itself, a batch and a loss. Out: the gradient on the weights, as if the batch had
been worked through whole; and ``choose_micro_batch``, how large a piece may be on this machine.
After GradCache (Gao et al., RepL4NLP 2021, section 3): embed in pieces without a graph, take the loss once over all
embeddings, then embed each piece again and hand on its part of the gradient. Unusual, and how ours differs: no state of
a generator is kept, since every piece has a seed of its own; the two sides are cut independently (``train.pieces``);
the last piece of either side, and all pieces of a side on which little more than a head trains, keep their graph and
are not computed again; and a tower that answers differently the second time is caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clasp.data.device import to_device
from clasp.training import micro_batches
from clasp.training.memory import ActivationMemory, free_bytes
from clasp.training.precision import Precision
from clasp.types import Batch, Loss, Modality, UserError

# A graph of no more than so many times the bytes of its embeddings is that of a head; it is kept, not computed again.
_SMALL_GRAPH_RATIO = 16
# Farthest that an embedding, a unit vector, may move between its two computations. The same kernels give the same bits;
# where others are chosen without a graph, rounding moves it by 1e-2 at most (bfloat16). Another draw of dropout at 0.1
# moved every row of a small BERT by 0.12 or more.
_MAX_REPEAT_DISTANCE = 0.05
# Of the free memory; the rest is for what a step takes besides the activations that it keeps.
_MEMORY_FRACTION = 0.5

SeedMicroBatch = Callable[[Modality, int], None]


@runtime_checkable
class Embedder(Protocol):
    """A module that embeds images and captions apart from each other."""

    def embed_image(self, inputs: Any) -> Float[Tensor, "rows E"]: ...

    def embed_text(self, inputs: Any) -> Float[Tensor, "rows E"]: ...

    def scale_and_bias(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class LossAndScale(NamedTuple):
    """The loss of a batch, whose gradient is now on the weights, and the scale of its logits."""

    loss: Tensor
    scale: Tensor


class MicroBatchChoice(NamedTuple):
    """Pairs in a piece, and why."""

    micro_batch: int
    reason: str


@dataclass(frozen=True, slots=True)
class MicroBatchEmbedder:
    """Where and in which numbers a model embeds, and how the random draws of a piece of a side are seeded."""

    model: Embedder
    device: torch.device
    precision: Precision
    seed: SeedMicroBatch

    def embed(self, side: Modality, number: int, inputs: micro_batches.TowerInput) -> Float[Tensor, "rows E"]:
        """Piece ``number`` of a side, with a graph where one is being kept; the same answer whenever it is asked."""
        self.seed(side, number)
        embed = self.model.embed_image if side == "image" else self.model.embed_text
        # one context a piece: weights cast without a graph must not be met again where there is one
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return at_least_float32(embed(to_device(inputs, self.device)))

    def weights(self) -> list[Tensor]:
        return [parameter for _, parameter in self.model.named_parameters()]


def at_least_float32(tensor: Tensor) -> Tensor:
    """In float32, or better where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def backward_in_micro_batches(embedder: MicroBatchEmbedder, batch: Batch, loss: Loss, micro_batch: int) -> LossAndScale:
    """Leaves the gradient of the batch's loss on the weights, with the activations of ``micro_batch`` pairs at a time.

    The batch need not be on the device. Raises UserError when a tower draws randomness that a seed does not repeat.
    """
    image, text = (
        CachedEmbeddings("image", embedder, batch.image, micro_batch),
        CachedEmbeddings("text", embedder, batch.text, micro_batch),
    )
    scale, bias = embedder.model.scale_and_bias()
    groups = batch.groups.to(embedder.device, non_blocking=True)
    parts = loss(
        image.in_pair_order(),
        text.in_pair_order(),
        at_least_float32(scale),
        None if bias is None else at_least_float32(bias),
        groups=groups,
    )
    torch.autograd.backward(parts.total)
    for side in (image, text):  # those of both that hold memory go first
        side.backward_cached_graphs()
    for side in (image, text):
        side.backward_recomputed()
    return LossAndScale(parts.total.detach(), scale.detach().float())


class CachedEmbeddings:
    """The embeddings of one side: made in pieces, given to the loss as if they came from nowhere, and followed back."""

    def __init__(
        self, name: Modality, embedder: MicroBatchEmbedder, inputs: micro_batches.TowerInput, micro_batch: int
    ):
        self.name: Modality = name
        self.embedder, self.micro_batches = embedder, micro_batches.split_micro_batches(inputs, micro_batch)
        others = list(range(len(self.micro_batches.pieces) - 1))
        with ActivationMemory(embedder.weights()) as kept:
            last = self._embed(len(others))
        small = last.requires_grad and kept.bytes <= _SMALL_GRAPH_RATIO * last.nbytes
        with torch.set_grad_enabled(small):
            embeddings = [*(self._embed(number) for number in others), last]
        self.graphs = dict(enumerate(embeddings)) if small else {len(others): last}
        self.recomputed = [] if small or not last.requires_grad else others
        self.leaf = torch.cat(embeddings).detach().requires_grad_(last.requires_grad)

    def in_pair_order(self) -> Float[Tensor, "B E"]:
        """The embeddings in the order of the pairs."""
        places = self.micro_batches.row_of_pair
        return self.leaf if places is None else self.leaf.index_select(0, places.to(self.leaf.device))

    def backward_cached_graphs(self) -> None:
        """Follows the loss's gradient through the graphs that were kept, and lets go of them."""
        while self.graphs:
            number, embeddings = self.graphs.popitem()
            self._backward_through(number, embeddings)

    def backward_recomputed(self) -> None:
        """Embeds the other pieces once more and follows the loss's gradient through them."""
        moves = []
        for number in self.recomputed:
            embeddings = self._embed(number)
            moves.append((embeddings.detach() - self.leaf.detach()[self._rows(number)]).norm(dim=1).amax())
            self._backward_through(number, embeddings)
        if moves and (farthest := float(torch.stack(moves).amax())) > _MAX_REPEAT_DISTANCE:
            raise UserError(
                f"the {self.name} tower draws random numbers of its own: embedded twice from one seed, a row moved by "
                f"{farthest:.2g}; its batches cannot be cut into pieces, so set train.micro_batch to the whole batch"
            )

    def _backward_through(self, number: int, embeddings: Float[Tensor, "rows E"]) -> None:
        if self.leaf.grad is not None:
            torch.autograd.backward(embeddings, self.leaf.grad[self._rows(number)])

    def _embed(self, number: int) -> Float[Tensor, "rows E"]:
        return self.embedder.embed(self.name, number, self.micro_batches.pieces[number])

    def _rows(self, number: int) -> slice:
        return slice(self.micro_batches.offsets[number], self.micro_batches.offsets[number + 1])


def choose_micro_batch(embedder: MicroBatchEmbedder, batch: Batch, pairs: int) -> MicroBatchChoice:
    """How many of the ``pairs`` of every batch to work through at a time: all, or the largest power of two that fits.

    Measured on a few pairs of a batch, with its longest captions: what one more pair keeps for the backward pass,
    against half of the memory that is free once gradients and the optimizer's memory are there too.
    """
    image, text = (
        _activation_bytes_per_row(embedder, "image", batch.image),
        _activation_bytes_per_row(embedder, "text", batch.text),
    )
    rows = [pairs * micro_batches.count_unique_rows(inputs) // len(batch.ids) for inputs in (batch.image, batch.text)]
    free = free_bytes(embedder.device)
    if free is None:
        return MicroBatchChoice(pairs, f"{pairs:,} pairs in one piece: how much memory is free is not told here")
    trained = sum(weight.nbytes for weight in embedder.weights() if weight.requires_grad)
    room = int(_MEMORY_FRACTION * (free - 3 * trained))  # a gradient and AdamW's two memories
    keeps = f"a pair keeps {_format_bytes(image + text)} for the backward pass"
    if rows[0] * image + rows[1] * text <= room:
        return MicroBatchChoice(
            pairs, f"{pairs:,} pairs in one piece: {keeps}, and {_format_bytes(free)} of memory is free"
        )
    most = max(1, room // (image + text))
    micro_batch = 1 << (most.bit_length() - 1)
    return MicroBatchChoice(
        micro_batch,
        f"{pairs:,} pairs in pieces of {micro_batch:,}, with the gradient of one: {keeps}, and "
        f"{_format_bytes(free)} of memory is free",
    )


def _activation_bytes_per_row(embedder: MicroBatchEmbedder, side: Modality, inputs: micro_batches.TowerInput) -> int:
    """Bytes that one more row keeps for the backward pass, from the difference that a few rows make."""
    rows = micro_batches.longest_rows(inputs, 4)
    few = len(rows) // 2

    def kept_by(count: int) -> int:
        with ActivationMemory(embedder.weights()) as kept:
            embedder.embed(side, 0, micro_batches.take_rows(inputs, rows[:count]))
        return kept.bytes

    return (kept_by(len(rows)) - (kept_by(few) if few else 0)) // (len(rows) - few)


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.2g} MB" if count >= 1e4 else f"{count} bytes"
