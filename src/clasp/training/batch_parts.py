"""A batch in parts, one on each process, with the loss of the whole batch.

Input: the loader of a process's parts (``PartReader``), a loss, ``Processes``. Output: ``PartBatches``, batches that
count what the other processes read, and ``WholeBatchLoss``. Note: embeddings are gathered and every process computes
the loss of the whole batch, whatever the loss is; so parts need not be equal, and the gradient is that of one process
to rounding, also with gradient caching. The towers, which take nearly all of the time, run on own rows only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from clasp.data.loader import PairLoader
from clasp.training.distributed import Processes
from clasp.types import Batch, Loss, LossParts, SkippedSample, UserError


@dataclass(frozen=True, slots=True)
class PartBatches:
    """This process's part of each batch of ``loader``; a ``BatchStream``.

    ``Batch.skipped`` and ``Batch.total_pairs`` are those of the whole batch. Raises ``UserError`` on every process for
    too many unreadable samples on all of them, and for a part without a readable one.
    """

    loader: PairLoader
    processes: Processes

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        processes = self.processes
        for batch in self.loader.uncounted_epoch(number, start=start):
            counts = processes.gather_numbers(len(batch.ids), len(batch.skipped))
            skipped = batch.skipped
            if any(left_out for _, left_out in counts):
                skipped = tuple(sample for part in processes.gather_objects(skipped) for sample in part)
            pairs = [pairs for pairs, _ in counts]
            if skipped or 0 in pairs:  # the same on every process, so most batches exchange nothing more
                with processes.alike():
                    self._check(skipped, pairs)
            yield replace(batch, skipped=skipped, pairs_of_all=sum(pairs))

    def _check(self, skipped: Sequence[SkippedSample], pairs: Sequence[int]) -> None:
        self.loader.bad_samples.add(skipped)
        if 0 in pairs:
            raise UserError(
                f"process {pairs.index(0)} of {self.processes.size} could read none of its pairs of a batch; give each "
                "process more of them: a larger train.batch_size, or fewer processes"
            )


@dataclass(frozen=True, slots=True)
class WholeBatchLoss:
    """A loss over the batch of all processes, each of which calls it with its own rows; a ``Loss`` itself.

    The value is that of the whole batch on every process. The gradient reaches the embeddings of this process, and the
    logit scale and bias on the first process only: the sum over processes is the gradient of the whole batch.
    """

    loss: Loss
    processes: Processes

    def __call__(
        self,
        image: Float[Tensor, "part E"],
        text: Float[Tensor, "part E"],
        scale: Float[Tensor, ""],
        bias: Float[Tensor, ""] | None = None,
        *,
        groups: Int[Tensor, "part 2"] | None = None,
    ) -> LossParts:
        processes = self.processes
        counts = [count for (count,) in processes.gather_numbers(len(image))]
        images, texts = (processes.gather_rows(rows, counts) for rows in (image, text))
        all_groups = None if groups is None else processes.gather_rows(groups, counts)
        if not processes.is_first:
            scale = _without_gradient(scale)
            bias = None if bias is None else _without_gradient(bias)
        return self.loss(images, texts, scale, bias, groups=all_groups)


def _without_gradient(value: Tensor) -> Tensor:
    """The same value with a gradient of zero: a loss of it can still be differentiated."""
    return value.detach() + 0 * value
