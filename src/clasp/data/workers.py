"""One function over many inputs, in order: in this process, or ahead of time in worker processes.

A thin use of torch's DataLoader for what it does well: answers through shared memory, workers that end when the main
process does, a time limit. What is asked is decided by the caller, so the number of workers changes nothing but
speed. Unusual: workers are never forked from a process with threads, and a dead or silent one is one clear line.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from clasp.types import UserError

_POLL_SECONDS = 5.0  # while waiting, how often to look whether the workers live: a forkserver's are not our children


class _RequestDataset:
    """Both halves of a DataLoader: what is asked, which changes every epoch, and the answer to one ask.

    A ``UserError`` travels as a value, since a worker's exceptions arrive with their traceback in the message.
    """

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read
        self.requests: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests)

    def __getitem__(self, ask: Any) -> Any:
        try:
            return self._read(ask)
        except UserError as error:
            return error

    def __getstate__(self) -> dict[str, Any]:
        return {"_read": self._read, "asks": ()}


class WorkerPool:
    """``read`` applied to one ask after another, in order: here, or ahead of time in worker processes.

    Workers are started at the first use and live until ``close``. One pass at a time. Raises ``UserError`` when a
    worker dies (noticed within seconds) or nothing arrives for ``timeout_seconds``.
    """

    def __init__(self, read: Callable[[Any], Any], *, workers: int = 0, timeout_seconds: float = 300.0) -> None:
        self._dataset = _RequestDataset(read)
        self._workers = workers
        self._timeout_seconds = timeout_seconds
        self._loader: DataLoader[Any] | None = None
        self._pass = 0
        self._finished = True

    def __call__(self, requests: Iterable[Any]) -> Iterator[Any]:
        """The answers to ``requests``."""
        self._pass += 1
        this = self._pass
        for answer in self._map_in_process(requests) if self._workers == 0 else self._map_in_workers(requests):
            assert this == self._pass, "a newer pass over this stream has begun"
            if isinstance(answer, UserError):
                raise answer
            yield answer

    def close(self) -> None:
        """End the workers, if there are any; a later pass starts new ones."""
        self._loader = None

    def _map_in_process(self, asks: Iterable[Any]) -> Iterator[Any]:
        return map(self._dataset.__getitem__, asks)

    def _map_in_workers(self, asks: Iterable[Any]) -> Iterator[Any]:
        if not self._finished:
            self.close()  # workers busy with a pass that was left could not say when they are ready for this one
        if self._loader is None:
            self._loader = self._start_loader()
        self._dataset.requests = asks
        self._finished = False
        answers = iter(self._loader)
        heard = time.monotonic()
        while True:
            try:
                answer = next(answers)
            except StopIteration:
                self._finished = True
                return
            except RuntimeError as error:
                said = str(error)
                if said.startswith("DataLoader timed out") and time.monotonic() - heard < self._timeout_seconds:
                    continue  # all workers live; go on waiting
                self.close()
                if not said.startswith("DataLoader "):
                    raise
                waited = f"nothing came for {time.monotonic() - heard:.0f} seconds ({' '.join(said.split())})"
                raise UserError(
                    f"workers = {self._workers}: {waited}; with workers = 0 the main process reads and shows what is "
                    "slow or fails (a script that has workers needs `if __name__ == '__main__':`)"
                ) from error
            yield answer
            heard = time.monotonic()

    def _start_loader(self) -> DataLoader[Any]:
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(kind)
        if kind == "forkserver":
            context.set_forkserver_preload(["clasp.data.readers"])  # imported once, not by each worker
        return DataLoader(
            self._dataset,  # pyright: ignore[reportArgumentType]  # all a map-style dataset needs is __getitem__
            sampler=self._dataset,
            batch_size=None,
            collate_fn=_identity,
            num_workers=self._workers,
            persistent_workers=True,
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
            timeout=min(_POLL_SECONDS, self._timeout_seconds),
            generator=torch.Generator(),  # else each pass would take a number from the global generator
        )


def _identity(answer: Any) -> Any:
    return answer


def _start_worker(number: int) -> None:
    # Ctrl-C is the main process's affair: it ends the workers once it has saved
    signal.signal(signal.SIGINT, signal.SIG_IGN)
