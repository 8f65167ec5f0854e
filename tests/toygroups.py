"""Processes that are threads: they exchange pickled values as processes do, but nothing has to be started.

In: a number of processes and a function of one of them. Out: what each returned, or raised. A thread that raises ends
the others at their next exchange, as a process that dies does.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from clasp.data.process_group import ProcessGroup


class LostThreadError(RuntimeError):
    """Another thread has ended."""


@dataclass
class _Exchange:
    size: int
    values: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.values, self.barrier = [None] * self.size, threading.Barrier(self.size)


@dataclass(frozen=True)
class ThreadGroup:
    """Thread ``rank`` of ``size``, all on this machine."""

    rank: int
    exchange: _Exchange

    @property
    def size(self) -> int:
        return self.exchange.size

    @property
    def node(self) -> ProcessGroup:
        return self

    def gather_objects(self, value: Any) -> list[Any]:
        try:
            self.exchange.values[self.rank] = pickle.dumps(value)
            self.exchange.barrier.wait(20)
        except threading.BrokenBarrierError:
            raise LostThreadError from None
        found = [pickle.loads(each) for each in self.exchange.values]
        with suppress(threading.BrokenBarrierError):  # by one that has all values, and has ended since
            self.exchange.barrier.wait(20)
        return found


def run_threads(size: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What each thread returned, or the exception that it raised."""
    exchange, found = _Exchange(size), [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadGroup(rank, exchange))
        except BaseException as error:
            found[rank] = error
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
