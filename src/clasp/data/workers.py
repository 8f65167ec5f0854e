"""One function over many inputs, in order: in this process, or ahead of time in worker processes.

A thin use of torch's DataLoader for what it does well: answers through shared memory, workers that end when the main
process does, a time limit. What is asked is decided by the caller, so the number of workers changes nothing but
speed. Unusual: workers are never forked from a process with threads, and a dead or silent one is one clear line.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from clasp.types import UserError


class _Asks:
    """Both halves of a DataLoader: what is asked, which changes every epoch, and the answer to one ask.

    A ``UserError`` travels as a value, since a worker's exceptions arrive with their traceback in the message.
    """

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read
        self.asks: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.asks)

    def __getitem__(self, ask: Any) -> Any:
        try:
            return self._read(ask)
        except UserError as error:
            return error

    def __getstate__(self) -> dict[str, Any]:
        return {"_read": self._read, "asks": ()}


class Stream:
    """``read`` applied to one ask after another, in order: here, or ahead of time in worker processes.

    Workers are started at the first use and live until ``close``; they never fork a process that has threads. One
    pass at a time. Raises ``UserError`` when a worker dies or nothing arrives for ``timeout_seconds``.
    """

    def __init__(self, read: Callable[[Any], Any], *, workers: int = 0, timeout_seconds: float = 300.0) -> None:
        self._asks = _Asks(read)
        self._workers = workers
        self._timeout_seconds = timeout_seconds
        self._loader: DataLoader[Any] | None = None
        self._pass = 0

    def __call__(self, asks: Iterable[Any]) -> Iterator[Any]:
        """The answers to ``asks``."""
        self._pass += 1
        this = self._pass
        try:
            for answer in self._answers(asks):
                assert this == self._pass, "a newer pass over these workers has begun"
                if isinstance(answer, UserError):
                    raise answer
                yield answer
        except RuntimeError as error:
            if not str(error).startswith("DataLoader "):
                raise
            self.close()
            raise UserError(
                f"workers = {self._workers}: {' '.join(str(error).split())}; workers = 0 loads in the main process and "
                "shows what is slow or fails (a script that starts workers needs `if __name__ == '__main__':`)"
            ) from error

    def close(self) -> None:
        """End the workers, if there are any; a later pass starts new ones."""
        self._loader = None

    def _answers(self, asks: Iterable[Any]) -> Iterable[Any]:
        if self._workers == 0:
            return map(self._asks.__getitem__, asks)
        if self._loader is None:
            kinds = multiprocessing.get_all_start_methods()
            self._loader = DataLoader(
                self._asks,  # pyright: ignore[reportArgumentType]  # all a map-style dataset needs is __getitem__
                sampler=self._asks,
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=self._workers,
                persistent_workers=True,
                multiprocessing_context="forkserver" if "forkserver" in kinds else "spawn",
                worker_init_fn=_start_worker,
                timeout=self._timeout_seconds,
                generator=torch.Generator(),  # else each pass would take a number from the global generator
            )
        self._asks.asks = asks
        return self._loader


def _as_it_is(answer: Any) -> Any:
    return answer


def _start_worker(number: int) -> None:
    # Ctrl-C is the main process's affair: it ends the workers once it has saved
    signal.signal(signal.SIGINT, signal.SIG_IGN)
