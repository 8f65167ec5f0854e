"""A batch distributed over several processes, exchanged in a ring.

Input: torch.distributed, initialised by the caller, and each process's equal part of a batch. Output: the parts of the
other processes one at a time (the whole batch of embeddings is never gathered), and reductions. Note: a single process
is a ring of size 1 in which nothing is sent, so that losses are written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ProcessRing:
    """Processes with equal parts of one batch, identified by rank: ``ProcessRing.from_group(group)``.

    With a ring, the batch of a loss is that of all processes in the order of their ranks. Every process calls the loss
    with its rows and groups (equally many rows, consistent group ids), and every process calls backward on the same
    output: both are collective. The value is that of the whole batch, equal on all processes. The gradient of each
    process's embeddings equals that of a single process with the whole batch. Replicated tensors (weights, ``scale``,
    ``bias``) get a *share* of their gradient on each process: the caller must sum the shares (all-reduce with SUM;
    where DistributedDataParallel averages, multiply by the number of processes).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def from_group(cls, group: dist.ProcessGroup | None = None) -> ProcessRing:
        """The ring of a process group; by default of all processes."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def rows_of(self, rank: int, rows: int) -> slice:
        """The rows of a process in the whole batch."""
        return slice(rank * rows, (rank + 1) * rows)

    def exchange(self, local: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields every process's rank and tensor, starting with ``local``; the next one is received during each
        iteration."""
        chunk = local.contiguous()
        for step in range(self.size):
            transfer = self._send(chunk, tag=0) if step + 1 < self.size else None
            yield (self.rank - step) % self.size, chunk
            if transfer is not None:
                chunk = transfer.wait()

    def send_to_next(self, tensor: Tensor) -> Tensor:
        """Sends a tensor to the next process and returns the one received from the previous.

        Called once per iteration of ``exchange``, it returns a tensor that accompanies a chunk to the chunk's owner.
        """
        return tensor if self.size == 1 else self._send(tensor.contiguous(), tag=1).wait()

    def all_gather(self, rows: Tensor) -> Tensor:
        """The concatenated rows of all processes; for small tensors."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous(), group=self.group)
        return torch.cat(parts)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        return self._all_reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """The largest over processes, in place."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def _all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, operation, group=self.group)
        return tensor

    def _send(self, tensor: Tensor, tag: int) -> _Transfer:
        """Starts a non-blocking exchange with both neighbours; tags separate chunks from what accompanies them."""
        following, previous = ((self.rank + step) % self.size for step in (1, -1))
        if self.group is not None:  # P2POp takes global ranks
            following, previous = (dist.get_global_rank(self.group, rank) for rank in (following, previous))
        arriving = torch.empty_like(tensor)
        send = dist.P2POp(dist.isend, tensor, following, self.group, tag)
        receive = dist.P2POp(dist.irecv, arriving, previous, self.group, tag)
        return _Transfer(arriving, dist.batch_isend_irecv([send, receive]))


@dataclass(frozen=True)
class _Transfer:
    """A pending transfer from the previous process, and to the next."""

    arriving: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.arriving
