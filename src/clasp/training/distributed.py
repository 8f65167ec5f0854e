"""The processes that train a run together, and the collectives that it needs.

Input: the environment that ``torchrun`` sets (``RANK``, ``WORLD_SIZE``, …). Output: ``Processes``. Note: there is no
DistributedDataParallel. Gradients of the trainable parameters, which are few, are summed once after the backward pass
(``sum_gradients``); the loss of the whole batch is in ``training.batch_parts``. Collectives of a step have a time-out
of minutes, those that wait for the work of other processes (evaluation, feature cache) one of a day; a process that has
ended is noticed at once by either; while they connect, after the minutes of a step at most.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from clasp.training.interrupt import INTERRUPTED_EXIT_CODE
from clasp.types import UserError

STEP_TIMEOUT, WAIT_TIMEOUT = timedelta(minutes=10), timedelta(days=1)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_Result = TypeVar("_Result")


class LostProcessError(UserError):
    """Another process has ended, or did not answer in time."""


class ReportedError(UserError):
    """An error that all processes know of: the one that raises it reports it, and the others end after that one."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that train together; by default this one alone, for which nothing is sent.

    ``rank`` of ``size`` in all, ``local_rank`` of ``local_size`` on this node. The methods are collective: every
    process calls them in the same order. They raise ``LostProcessError`` where another process has ended.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    """How often torchrun has restarted them"""
    device: torch.device = field(default_factory=lambda: _this_device())
    waiting: dist.ProcessGroup | None = None
    """The group of long waits"""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder and reports."""
        return self.rank == 0

    @property
    def seed_key(self) -> tuple[int, ...]:
        """What distinguishes the dropout masks of this process from those of the others; empty for a single one."""
        return () if self.size == 1 else (self.rank,)

    @property
    def sharing_memory(self) -> int:
        """Processes that share the memory of the device: on a CPU all of this node."""
        return self.local_size if self.device.type == "cpu" else 1

    # --- calls of one process ------------------------------------------------------------------------------------

    def first(self, call: Callable[[], _Result]) -> _Result:
        """The result of ``call`` on the first process, which alone makes it; the others wait, and end where it fails.

        The result is pickled."""
        if self.size == 1:
            return call()
        answer: list[Any] = [None]
        try:
            answer = [(0, call())] if self.is_first else answer
        except BaseException as error:
            with suppress(RuntimeError):  # of a process that has ended too
                dist.broadcast_object_list([(_exit_code(error), None)], group=self.waiting)
            raise
        with self._answered(WAIT_TIMEOUT):
            dist.broadcast_object_list(answer, group=self.waiting)
        code, result = answer[0]
        if code:
            self.end_after_first(code)
        return result

    def in_turn(self, call: Callable[[], _Result]) -> _Result:
        """The own result of ``call``, made by the first process, then by one process of each other node, then by the
        rest: what it puts on disk is computed once."""
        if self.size == 1:
            return call()
        mine = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        results: list[_Result] = []
        for turn in range(3):
            failed: BaseException | None = None
            if turn == mine:
                try:
                    results.append(call())
                except BaseException as error:
                    failed = error
            codes: list[Any] = [0] * self.size
            try:
                with self._answered(WAIT_TIMEOUT):
                    dist.all_gather_object(codes, 0 if failed is None else _exit_code(failed), group=self.waiting)
            finally:
                if failed is not None:
                    raise self._reported(failed)
            if any(codes):
                self._end_after(codes.index(max(codes)), max(codes))
        return results[0]

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Around what may raise ``UserError``, on all processes or on some: the first of these reports it, all end."""
        failed: UserError | None = None
        try:
            yield
        except (ReportedError, LostProcessError):
            raise  # all know of the one, and the other processes of the second have ended or hang
        except UserError as error:
            failed = error
        found = [rank for rank, wrong in enumerate(self.gather_objects(failed is not None)) if wrong]
        if failed is not None and found[0] == self.rank:
            raise self._reported(failed)
        if found:
            self._end_after(found[0], 2)

    def _reported(self, error: BaseException) -> BaseException:
        """An error that the other processes know of, so that ``alike`` around it does not tell them again."""
        if self.size == 1 or not isinstance(error, UserError) or isinstance(error, LostProcessError):
            return error
        reported = ReportedError(str(error))
        reported.__cause__ = error
        return reported

    def end_after_first(self, code: int) -> NoReturn:
        """End this process as soon as the first one has ended: the launcher ends the others with the one that ends
        before them."""
        self._end_after(0, code)

    def _end_after(self, rank: int, code: int) -> NoReturn:
        if rank != self.rank:
            with suppress(RuntimeError):
                dist.recv(torch.zeros(1), rank, group=self.waiting)  # never sent: returns when the connection closes
        raise SystemExit(code)

    # --- agreement -----------------------------------------------------------------------------------------------

    def gather_numbers(self, *numbers: int) -> list[tuple[int, ...]]:
        """The numbers of every process, in order."""
        if self.size == 1:
            return [numbers]
        own = torch.tensor(numbers)
        found = [torch.zeros_like(own) for _ in range(self.size)]
        with self._answered(STEP_TIMEOUT):
            dist.all_gather(found, own)
        return [tuple(each.tolist()) for each in found]

    def gather_objects(self, value: _Result) -> list[_Result]:
        """The value of every process, in order; pickled. Waits long."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._answered(WAIT_TIMEOUT):
            dist.all_gather_object(found, value, group=self.waiting)
        return found

    def agree_on_signal(self, name: str | None) -> str | None:
        """A signal that any process has received (``name``: this one), so that all stop after the same step."""
        if self.size == 1:
            return name
        number = max(numbers[0] for numbers in self.gather_numbers(signal.Signals[name].value if name else 0))
        return signal.Signals(number).name if number else None

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Raises ``UserError`` naming the first of ``facts`` in which a process differs from the first."""
        every = self.gather_objects(dict(facts))
        for what in facts:
            differ = [rank for rank, theirs in enumerate(every) if theirs[what] != every[0][what]]
            if differ:
                with self.alike():
                    raise UserError(f"process {differ[0]} of {self.size} has other {what} than process 0")

    # --- tensors -------------------------------------------------------------------------------------------------

    def gather_rows(self, rows: Shaped[Tensor, "part ..."], counts: Sequence[int]) -> Shaped[Tensor, "B ..."]:
        """The rows of all processes, in order of rank; only this process's have a gradient. ``counts``: rows of each
        process."""
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        with self._answered(STEP_TIMEOUT):
            dist.all_gather(parts, padded)
        pieces = [part[:count] for part, count in zip(parts, counts, strict=True)]
        pieces[self.rank] = rows
        return torch.cat(pieces)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace the gradient of each parameter by its sum over all processes; one without any keeps none."""
        if self.size == 1:
            return
        with self._answered(STEP_TIMEOUT):
            reached = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
            dist.all_reduce(reached, dist.ReduceOp.MAX)
            trained = [parameter for parameter, some in zip(parameters, reached.tolist(), strict=True) if some]
            gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
            flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), torch.zeros(0, device=self.device)])
            dist.all_reduce(flat)
        for parameter, total in zip(trained, flat.split([parameter.numel() for parameter in trained]), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.size == 1:
            return
        with self._answered(STEP_TIMEOUT), torch.no_grad():
            for tensor in tensors:
                copied = tensor.detach().contiguous()
                dist.broadcast(copied, 0)
                tensor.copy_(copied)

    @contextmanager
    def _answered(self, timeout: timedelta) -> Iterator[None]:
        """Turns the error of a collective into one line."""
        with _lost_process(
            f"process {self.rank} of {self.size} ends, since another has ended, or did not answer for "
            f"{timeout.total_seconds() / 60:.0f} minutes; the error of that one is the reason",
            "a run that has begun goes on with clasp resume",
        ):
            yield


@contextmanager
def _lost_process(said: str, advice: str) -> Iterator[None]:
    """Turns errors of torch.distributed into ``LostProcessError``, with their text between ``said`` and ``advice``."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostProcessError(f"{said} ({' '.join(str(error).split())[:200]}); {advice}") from error


def _this_device() -> torch.device:
    device = PartialState().device
    assert device is not None
    return device


def _exit_code(error: BaseException) -> int:
    match error:
        case UserError():
            return 2
        case KeyboardInterrupt():
            return INTERRUPTED_EXIT_CODE
        case _:
            return 1


@contextmanager
def open_processes() -> Iterator[Processes]:
    """The processes that ``torchrun`` or ``clasp train --processes`` has started; otherwise this one alone.

    Raises ``UserError`` for more processes on a node than it has GPUs.
    """
    environment = os.environ
    if environment.get("WORLD_SIZE", "1") == "1" or "RANK" not in environment:
        yield Processes()
        return
    missing = [name for name in _TORCHRUN if not environment.get(name, "").isdigit()]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set, and {missing[0]} is not a number ({environment.get(missing[0])!r}): start "
            "the processes with torchrun or --processes, which set all, or unset WORLD_SIZE"
        )
    local_rank, local_size = int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if gpus:
        if local_size > gpus:
            raise UserError(f"{local_size} processes on a node with {gpus} GPUs: at most one process for each GPU")
        torch.cuda.set_device(local_rank)
    waiting = connect(int(environment["RANK"]), int(environment["WORLD_SIZE"]), gpus=gpus > 0)
    yield Processes(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=local_rank,
        local_size=local_size,
        device=torch.device("cuda", local_rank) if gpus else torch.device("cpu"),
        restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
        waiting=waiting,
    )
    dist.destroy_process_group()  # not after an error: it would wait for processes that have ended


def connect(rank: int, size: int, *, gpus: bool, meeting: str = "env://") -> dist.ProcessGroup:
    """Connect this process with the others, which meet at ``meeting`` (``init_method`` of torch); returns the group of
    long waits.

    Raises ``LostProcessError`` where another process ends before all are connected.
    """
    with _lost_process(
        f"process {rank} of {size} cannot connect with the others: one has ended, did not start within "
        f"{STEP_TIMEOUT.total_seconds() / 60:.0f} minutes, or cannot be reached",
        "the same command starts them anew",
    ):
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, meeting, timeout=STEP_TIMEOUT, rank=rank, world_size=size)
        waiting = dist.new_group(backend="gloo", timeout=STEP_TIMEOUT)
    assert isinstance(waiting, dist.ProcessGroup), "this process is in the group of all"
    _set_pg_timeout(WAIT_TIMEOUT, waiting)  # only now: it is also how long one waits for the others to connect
    return waiting
