"""One batch that lies on several processes.

In: torch.distributed, initialised by the caller, and each process's equal part of a batch. Out: the parts of the
others one at a time (never the whole batch of embeddings), and sums over processes. Unusual: one process alone is a
ring too, of size 1, in which nothing is sent; so losses are written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ProcessRing:
    """Processes that hold equal parts of one batch, told apart by rank: ``ProcessRing.of(group)``.

    Given to a loss, the batch is that of all processes in the order of their ranks. Every process calls the loss with
    its own rows and groups (equally many rows, groups numbered alike everywhere), and every process calls backward on
    the same part of what it returned: both are collective. The value is that of the whole batch, the same everywhere.
    The gradient of each process's embeddings is what one process with the whole batch would have given them. Whatever
    the processes have in common (weights, ``scale``, ``bias``) gets on each a *share* of its gradient: the caller must
    add the shares up (all-reduce with SUM; where DistributedDataParallel averages, times the number of processes).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def from_group(cls, group: dist.ProcessGroup | None = None) -> ProcessRing:
        """The processes of a group that this one is in; by default all there are."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def rows_of(self, rank: int, rows: int) -> slice:
        """Where a process's rows lie in the whole batch."""
        return slice(rank * rows, (rank + 1) * rows)

    def exchange(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every process's tensor, with its rank; the own one first. The next travels while one is looked at."""
        visitor = own.contiguous()
        for step in range(self.size):
            travel = self._send(visitor, tag=0) if step + 1 < self.size else None
            yield (self.rank - step) % self.size, visitor
            if travel is not None:
                visitor = travel.wait()

    def send_to_next(self, tensor: Tensor) -> Tensor:
        """Hands a tensor to the next process and returns what the previous one hands over.

        Called once per visitor, it brings a tensor that goes with a visitor home with its last call.
        """
        return tensor if self.size == 1 else self._send(tensor.contiguous(), tag=1).wait()

    def all_gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes; for small things."""
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

    def _all_reduce(self, tensor: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, how, group=self.group)
        return tensor

    def _send(self, tensor: Tensor, tag: int) -> _Transfer:
        """Starts a tensor on its way; tags keep visitors and what goes with them apart."""
        following, previous = ((self.rank + step) % self.size for step in (1, -1))
        if self.group is not None:  # peers are named by their rank among all processes
            following, previous = (dist.get_global_rank(self.group, rank) for rank in (following, previous))
        arriving = torch.empty_like(tensor)
        send = dist.P2POp(dist.isend, tensor, following, self.group, tag)
        receive = dist.P2POp(dist.irecv, arriving, previous, self.group, tag)
        return _Transfer(arriving, dist.batch_isend_irecv([send, receive]))


@dataclass(frozen=True)
class _Transfer:
    """What is under way from the previous process, and to the next."""

    arriving: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.arriving
