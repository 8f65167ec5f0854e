"""One thread that runs the model, and a bounded queue before it: concurrent requests share a forward pass.

Input: texts, or pixels, from many threads. Output: their embeddings. Note: the thread takes all that waits, and encodes
the texts of all requests in one call, and the pixels in one call; a request that comes meanwhile waits for the next. A
full queue raises ``QueueFullError`` at once, a result that takes too long ``ModelTimeoutError``.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from clasp.plain_types import SearchModel

_ROWS_AT_ONCE = 256  # texts or images of one call, unless one request alone has more
_REMEMBERED = 1024  # embeddings of texts that are kept: the pages of one search encode its words once


class QueueFullError(Exception):
    """As many requests wait for the model as may."""


class ModelTimeoutError(Exception):
    """The model did not answer in time."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Texts or pixels of one request; one of them is empty."""

    texts: Sequence[str]
    pixels: np.ndarray | None
    done: Future[np.ndarray] = field(default_factory=Future)

    @property
    def rows(self) -> int:
        return len(self.texts) if self.pixels is None else len(self.pixels)


class ModelQueue:
    """The model behind a queue of at most ``waiting`` requests, each answered within ``seconds``."""

    def __init__(
        self,
        model: SearchModel,
        *,
        waiting: int,
        seconds: float,
        on_call: Callable[[str, int], None] = lambda kind, rows: None,
    ) -> None:
        self._model, self._waiting, self._seconds, self._on_call = model, waiting, seconds, on_call
        self._jobs: list[_Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()
        self._thread = threading.Thread(target=self._run, name="clasp-model", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._jobs)

    def encode_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Embeddings of texts; those of recent ones are kept. Raises as the class describes."""
        with self._changed:
            found = {text: self._known[text] for text in texts if text in self._known}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        if new:
            rows = self._wait(_Job(new, None))
            found.update(zip(new, rows, strict=True))
            with self._changed:
                self._known.update(zip(new, rows, strict=True))
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        return np.stack([found[text] for text in texts])

    def encode_pixels(self, pixels: Float[np.ndarray, "n 3 height width"]) -> Float[np.ndarray, "n E"]:
        """Embeddings of outputs of the model's transform. Raises as the class describes."""
        return self._wait(_Job((), pixels))

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _wait(self, job: _Job) -> np.ndarray:
        with self._changed:
            if len(self._jobs) >= self._waiting or self._closed:
                raise QueueFullError
            self._jobs.append(job)
            self._changed.notify()
        try:
            return job.done.result(self._seconds)
        except FutureTimeoutError:
            job.done.cancel()  # not started yet: it is not computed for nobody
            raise ModelTimeoutError from None

    def _run(self) -> None:
        while (jobs := self._take()) is not None:
            for kind in (
                [job for job in jobs if job.pixels is None],
                [job for job in jobs if job.pixels is not None],
            ):
                if kind:
                    self._encode(kind)

    def _take(self) -> list[_Job] | None:
        """All that wait, up to ``_ROWS_AT_ONCE`` rows; ``None`` when the queue is closed and empty."""
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            if not self._jobs:
                return None
            count, rows = 0, 0
            while count < len(self._jobs) and (count == 0 or rows + self._jobs[count].rows <= _ROWS_AT_ONCE):
                rows += self._jobs[count].rows
                count += 1
            taken, self._jobs[:count] = self._jobs[:count], []
        return [job for job in taken if job.done.set_running_or_notify_cancel()]

    def _encode(self, jobs: Sequence[_Job]) -> None:
        sizes = [job.rows for job in jobs]
        try:
            pixels = [job.pixels for job in jobs if job.pixels is not None]
            if pixels:
                rows = np.asarray(self._model.encode_pixels(np.concatenate(pixels)))
            else:
                rows = np.asarray(self._model.encode_text([text for job in jobs for text in job.texts]))
            self._on_call("image" if pixels else "text", sum(sizes))
            for job, part in zip(jobs, np.split(rows, np.cumsum(sizes)[:-1]), strict=True):
                job.done.set_result(part)
        except BaseException as error:  # whatever it is, nobody waits for ever
            if len(jobs) > 1:  # the input of one request does not fail the others
                for job in jobs:
                    self._encode([job])
                return
            jobs[0].done.set_exception(error)
