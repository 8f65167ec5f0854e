"""An ordered map of one function over many requests, in this process or prefetched in worker processes.

Built on torch's DataLoader for shared-memory transfer, workers that end with the main process, and timeouts. The caller
decides the requests, so the number of workers affects nothing but speed. Note: workers are never forked from a process
with threads, and a dead or hanging worker is a one-line ``UserError``.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from clasp.plain_types import UserError

_POLL_SECONDS = (
    5.0  # how often to check that workers are alive while waiting: a forkserver's are not our child processes
)


class _RequestDataset:
    """Sampler and dataset of a DataLoader: the requests, which change every epoch, and the result of one request.

    A ``UserError`` is returned as a value, since a worker's exceptions arrive with their traceback in the message.
    """

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read
        self.requests: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests)

    def __getitem__(self, request: Any) -> Any:
        try:
            return self._read(request)
        except UserError as error:
            return error

    def __getstate__(self) -> dict[str, Any]:
        return {"_read": self._read, "requests": ()}


class WorkerPool:
    """Applies ``read`` to requests, in order: in this process, or prefetched in worker processes.

    Workers are started at the first use and live until ``close``. One pass at a time. Raises ``UserError`` when a
    worker dies (detected within seconds) or no result arrives for ``timeout_seconds``.
    """

    def __init__(self, read: Callable[[Any], Any], *, workers: int = 0, timeout_seconds: float = 300.0) -> None:
        self._dataset = _RequestDataset(read)
        self._workers = workers
        self._timeout_seconds = timeout_seconds
        self._loader: DataLoader[Any] | None = None
        self._pass = 0
        self._finished = True

    def __call__(self, requests: Iterable[Any]) -> Iterator[Any]:
        """The results of ``requests``, in order."""
        self._pass += 1
        current = self._pass
        for result in self._map_in_process(requests) if self._workers == 0 else self._map_in_workers(requests):
            assert current == self._pass, "a newer pass over this stream has begun"
            if isinstance(result, UserError):
                raise result
            yield result

    def close(self) -> None:
        """Ends the workers, if any; a later pass starts new ones."""
        self._loader = None

    def _map_in_process(self, requests: Iterable[Any]) -> Iterator[Any]:
        return map(self._dataset.__getitem__, requests)

    def _map_in_workers(self, requests: Iterable[Any]) -> Iterator[Any]:
        if not self._finished:
            self.close()  # workers may still be busy with an abandoned pass
        if self._loader is None:
            self._loader = self._start_loader()
        self._dataset.requests = requests
        self._finished = False
        results = iter(self._loader)
        last_result = time.monotonic()
        while True:
            try:
                result = next(results)
            except StopIteration:
                self._finished = True
                return
            except RuntimeError as error:
                message, waited = str(error), time.monotonic() - last_result
                if message.startswith("DataLoader timed out") and waited < self._timeout_seconds:
                    continue  # all workers are alive
                self.close()
                if not message.startswith("DataLoader "):
                    raise
                reason = f"nothing came for {waited:.0f} seconds ({' '.join(message.split())})"
                raise UserError(
                    f"workers = {self._workers}: {reason}; with workers = 0 the main process reads and shows what is "
                    "slow or fails (a script that has workers needs `if __name__ == '__main__':`)"
                ) from error
            yield result
            last_result = time.monotonic()

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
            generator=torch.Generator(),  # otherwise each pass would draw from the global generator
        )


def _identity(result: Any) -> Any:
    return result


def _start_worker(number: int) -> None:
    # Ctrl-C is handled by the main process, which ends the workers after saving
    signal.signal(signal.SIGINT, signal.SIG_IGN)
