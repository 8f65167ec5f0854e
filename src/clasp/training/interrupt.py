"""Interruption: Ctrl-C and SIGTERM become a stop request that the training loop honours after the current step; in
every other part of a command, SIGTERM raises KeyboardInterrupt, as Ctrl-C does.

Input: a ``with`` block in the main thread. Output: ``requested``, the name of the signal once one has arrived. Note:
Ctrl-C after another signal raises KeyboardInterrupt immediately, SIGTERM does not. Previous handlers are restored
afterwards; outside the main thread Python allows no handlers, and the block does nothing. A process forked inside the
block (a data worker) inherits the handlers; there SIGTERM terminates it as usual and Ctrl-C is left to the parent.
Nothing here imports torch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED_EXIT_CODE = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop:
    """Context manager that records a stop request by signal."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not set from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:
                _end_by(number)
            return
        if self.requested is not None:
            if number == signal.SIGTERM:  # a supervisor's, or Linux's when the launcher dies, may come twice
                return
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        # os.write: a handler may run while a lock is held, such as that of a progress bar
        os.write(2, b"\nstopping after this step and saving; Ctrl-C stops immediately\n")


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """A block in which SIGTERM raises ``KeyboardInterrupt``, so that what is cleaned up after Ctrl-C is after it."""
    process = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            _end_by(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _end_by(number: int) -> None:
    """End this process as the signal ends one that has no handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
