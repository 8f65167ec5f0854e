"""Runs a function in a forked process, which may be killed at a moment of its life; returns what became of it.

Input: a function without arguments, and the moment. Output: ``Ended``: the exit code as of the command (0, 2 for a
``UserError``, 1 for a traceback, -9 for a kill), what it printed and logged, and what it returned. Note: the parent
never computes, so that it has no threads that a fork would lose.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clasp.types import UserError

LIMIT = 120.0
"""Seconds after which a process counts as hanging"""
HANGS = "hangs"


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a process; ``answer`` is what the function returned, ``None`` if it did not."""

    code: int
    said: str
    answer: Any
    hung: bool = False

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL and not self.hung

    @property
    def is_refusal(self) -> bool:
        """Whether it ended with a ``UserError`` of one line."""
        return self.code == 2

    def describe(self) -> str:
        """Its outcome and the last line of what it said."""
        lines = self.said.strip().splitlines()
        return f"{HANGS if self.hung else f'exit {self.code}'}: {lines[-1] if lines else ''}"


def preload_imports(work: Callable[[], Any]) -> None:
    """Import here what ``work`` imports in a process of its own, so that later ones need not."""

    def imported() -> list[str]:
        work()
        return sorted(sys.modules)

    ended = run_in_child(imported)
    assert ended.code == 0, ended.said
    for name in ended.answer:
        with contextlib.suppress(Exception):  # a few are parts of an extension, known under another name
            importlib.import_module(name)


class Child:
    """A process that runs ``work``, from when it is made on; it is waited for once."""

    def __init__(self, work: Callable[[], Any]):
        self._folder = tempfile.TemporaryDirectory()
        self._said, self._answered = Path(self._folder.name, "said"), Path(self._folder.name, "answer")
        self._process = os.fork()
        if not self._process:
            _work(work, self._said, self._answered)

    def wait(self, *, kill_after: float | None = None, begun: Path | None = None, limit: float = LIMIT) -> Ended:
        """Its end; it is killed (SIGKILL) after ``kill_after`` seconds if it has not ended.

        The seconds are counted from when the file ``begun`` exists, if one is given.
        """
        with self._folder:
            code, hung = _wait(self._process, limit if kill_after is None else kill_after, begun)
            if hung:
                os.kill(self._process, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
            said, answered = self._said, self._answered
            answer = pickle.loads(answered.read_bytes()) if code == 0 and answered.exists() else None
            text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
            return Ended(code, text, answer, hung=hung and kill_after is None)


def run_in_child(
    work: Callable[[], Any], *, kill_after: float | None = None, begun: Path | None = None, limit: float = LIMIT
) -> Ended:
    """Fork, run ``work``, and wait for its end as ``Child.wait`` does."""
    return Child(work).wait(kill_after=kill_after, begun=begun, limit=limit)


def _wait(process: int, seconds: float, begun: Path | None) -> tuple[int, bool]:
    """The exit code, and whether the process still runs after ``seconds``."""
    deadline = time.monotonic() + (LIMIT if begun else seconds)
    while True:
        if begun and begun.exists():
            begun, deadline = None, time.monotonic() + seconds
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), False
        left = deadline - time.monotonic()
        if left <= 0:
            return 0, True
        time.sleep(min(left, 0.002))


def _work(work: Callable[[], Any], said: Path, answered: Path) -> None:
    """In the child: never returns."""
    code = 1
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = open(descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", force=True)
        answer = work()
        answered.write_bytes(pickle.dumps(answer))
        code = 0
    except UserError as error:
        print(f"clasp: {error}")
        code = 1 if "\n" in str(error) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
