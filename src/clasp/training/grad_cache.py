"""Gradient caching (GradCache): the exact gradient of a contrastive batch whose activations do not fit in memory.

Input: a model that embeds the modalities separately, a batch and a loss. Output: the gradient on the weights, equal to
that of the whole batch; and ``choose_micro_batch``, the micro-batch size for this machine. After GradCache (Gao et al.,
RepL4NLP 2021, section 3): embed micro-batches without a graph, compute the loss once over all embeddings, then embed
each micro-batch again and backpropagate its part of the gradient. Note, and how ours differs: no RNG state is saved,
since every micro-batch has its own seed; the modalities are split independently (``training.micro_batches``); the last
micro-batch of either modality, and all of a modality in which little more than a head is trained, keep their graph and
are not recomputed; and a tower that is not deterministic given the seed is detected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clasp.data.device import to_device
from clasp.plain_types import Precision
from clasp.training import micro_batches
from clasp.training.memory import ActivationMemory, free_bytes
from clasp.types import Batch, Loss, Modality, UserError

# Up to this ratio of graph bytes to embedding bytes, the graph is that of a head; it is kept, not recomputed.
_SMALL_GRAPH_RATIO = 16
# Maximum distance of an embedding, a unit vector, between its two computations. The same kernels give the same bits;
# where other kernels are chosen without a graph, rounding moves it by at most 1e-2 (bfloat16). A different dropout mask
# at 0.1 moved every row of a small BERT by 0.12 or more.
_MAX_REPEAT_DISTANCE = 0.05
# Fraction of the free memory for saved activations; the rest is for everything else in a step.
_MEMORY_FRACTION = 0.5

SeedMicroBatch = Callable[[Modality, int], None]


@runtime_checkable
class Embedder(Protocol):
    """A module that embeds images and captions separately."""

    def embed_image(self, inputs: Any) -> Float[Tensor, "rows E"]: ...

    def embed_text(self, inputs: Any) -> Float[Tensor, "rows E"]: ...

    def scale_and_bias(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class LossAndScale(NamedTuple):
    """The loss of a batch, whose gradient is on the weights, and the logit scale."""

    loss: Tensor
    scale: Tensor


class MicroBatchChoice(NamedTuple):
    """Pairs per micro-batch and the reason."""

    micro_batch: int
    reason: str


@dataclass(frozen=True, slots=True)
class MicroBatchEmbedder:
    """A model with its device, precision and the seeding of a micro-batch of a modality."""

    model: Embedder
    device: torch.device
    precision: Precision
    seed: SeedMicroBatch

    def embed(self, side: Modality, number: int, inputs: micro_batches.TowerInput) -> Float[Tensor, "rows E"]:
        """Embed micro-batch ``number`` of a modality, with a graph in grad mode; deterministic, as it is seeded
        first."""
        self.seed(side, number)
        embed = self.model.embed_image if side == "image" else self.model.embed_text
        # one autocast context per call: its cache must not reuse weights cast without a graph where one is recorded
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return at_least_float32(embed(to_device(inputs, self.device)))

    def weights(self) -> list[Tensor]:
        return [parameter for _, parameter in self.model.named_parameters()]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Promoted to at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def backward_in_micro_batches(embedder: MicroBatchEmbedder, batch: Batch, loss: Loss, micro_batch: int) -> LossAndScale:
    """Adds the gradient of the batch's loss to the weights, with the activations of ``micro_batch`` pairs at a time.

    The batch need not be on the device. Raises ``UserError`` for a tower whose randomness the seed does not control.
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
    for side in (image, text):  # free the graphs of both before recomputing
        side.backward_cached_graphs()
    for side in (image, text):
        side.backward_recomputed()
    return LossAndScale(parts.total.detach(), scale.detach().float())


class CachedEmbeddings:
    """The embeddings of one modality: computed in micro-batches, a leaf tensor for the loss, then backpropagated
    through."""

    def __init__(
        self, name: Modality, embedder: MicroBatchEmbedder, inputs: micro_batches.TowerInput, micro_batch: int
    ):
        self.name: Modality = name
        self.embedder, self.micro_batches = embedder, micro_batches.split_micro_batches(inputs, micro_batch)
        others = list(range(len(self.micro_batches.pieces) - 1))
        with ActivationMemory(embedder.weights()) as saved:
            last = self._embed(len(others))
        small = last.requires_grad and saved.bytes <= _SMALL_GRAPH_RATIO * last.nbytes
        with torch.set_grad_enabled(small):
            embeddings = [*(self._embed(number) for number in others), last]
        self.graphs = dict(enumerate(embeddings)) if small else {len(others): last}
        self.recomputed = [] if small or not last.requires_grad else others
        self.leaf = torch.cat(embeddings).detach().requires_grad_(last.requires_grad)

    def in_pair_order(self) -> Float[Tensor, "B E"]:
        """The embeddings in the order of the pairs."""
        rows = self.micro_batches.row_of_pair
        return self.leaf if rows is None else self.leaf.index_select(0, rows.to(self.leaf.device))

    def backward_cached_graphs(self) -> None:
        """Backpropagates the loss's gradient through the graphs that were kept, and frees them."""
        while self.graphs:
            number, embeddings = self.graphs.popitem()
            self._backward_through(number, embeddings)

    def backward_recomputed(self) -> None:
        """Embeds the other micro-batches again and backpropagates the loss's gradient through them."""
        distances = []
        for number in self.recomputed:
            embeddings = self._embed(number)
            distances.append((embeddings.detach() - self.leaf.detach()[self._rows(number)]).norm(dim=1).amax())
            self._backward_through(number, embeddings)
        if distances and (farthest := float(torch.stack(distances).amax())) > _MAX_REPEAT_DISTANCE:
            raise UserError(
                f"the {self.name} tower draws random numbers of its own: embedded twice from one seed, a row moved by "
                f"{farthest:.2g}; its batches cannot be split, so set train.micro_batch to the whole batch"
            )

    def _backward_through(self, number: int, embeddings: Float[Tensor, "rows E"]) -> None:
        if self.leaf.grad is not None:
            torch.autograd.backward(embeddings, self.leaf.grad[self._rows(number)])

    def _embed(self, number: int) -> Float[Tensor, "rows E"]:
        return self.embedder.embed(self.name, number, self.micro_batches.pieces[number])

    def _rows(self, number: int) -> slice:
        return slice(self.micro_batches.offsets[number], self.micro_batches.offsets[number + 1])


def choose_micro_batch(
    embedder: MicroBatchEmbedder, batch: Batch, pairs: int, *, sharing_memory: int = 1
) -> MicroBatchChoice:
    """The micro-batch size for batches of ``pairs``: all, or the largest power of two that fits in memory.

    Measured on a few pairs of a batch, with its longest captions: the activation memory of one more pair, against half
    of the memory that is free after gradients and optimizer state. ``sharing_memory``: processes that share it.
    """
    image, text = (
        _activation_bytes_per_row(embedder, "image", batch.image),
        _activation_bytes_per_row(embedder, "text", batch.text),
    )
    rows = [pairs * micro_batches.count_unique_rows(inputs) // len(batch.ids) for inputs in (batch.image, batch.text)]
    free = free_bytes(embedder.device)
    if free is None:
        return MicroBatchChoice(pairs, f"{pairs:,} pairs in one piece: the free memory of this device is unknown")
    free //= sharing_memory
    trained = sum(weight.nbytes for weight in embedder.weights() if weight.requires_grad)
    room = int(_MEMORY_FRACTION * (free - 3 * trained))  # a gradient and AdamW's two moments
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
    """Activation memory of one more row, from the difference between 4 rows and 2."""
    rows = micro_batches.longest_rows(inputs, 4)
    few = len(rows) // 2

    def saved_by(count: int) -> int:
        with ActivationMemory(embedder.weights()) as saved:
            embedder.embed(side, 0, micro_batches.take_rows(inputs, rows[:count]))
        return saved.bytes

    return (saved_by(len(rows)) - (saved_by(few) if few else 0)) // (len(rows) - few)


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.2g} MB" if count >= 1e4 else f"{count} bytes"
