"""Reads mutated inputs one after another in processes of bounded memory, and sorts what became of each.

Input: a ``Reader``, a seed, how many. Output: a ``Tally``. An input must give a value, a ``UserError`` of one line, or
a counted bad sample. A defect is any other error, a process that dies, more than ``CPU_LIMIT`` seconds, more than
``MEMORY_LIMIT``, or an attempt to start a program, open a connection or import what the input names. Note: an input
depends on (seed, reader, number) only, so that one can be repeated alone.
"""

from __future__ import annotations

import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from clasp.data.images import ImageError
from clasp.types import UserError

CPU_LIMIT, WALL_LIMIT = 20.0, 200.0  # seconds an input may take: of the processor, and waiting
MEMORY_LIMIT = 1 << 30  # bytes of address space that an input may add
CANARY = "clasp_canary"
VALUE, REFUSED, BAD_SAMPLE = "read", "refused in one line", "a bad sample"
_RUNS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect")


@dataclass(frozen=True)
class Reader:
    """One kind of input: ``read(chance, folder)`` makes one in an empty folder and reads it; returns the outcome."""

    name: str
    inputs: int
    """How many of 100,000"""
    prepare: Callable[[Path], Callable[[random.Random, Path], str]]
    """``prepare(folder)``, once in each process, returns ``read``"""


@dataclass
class Tally:
    """Outcomes of the inputs, and the defects: a line each, with the number of the input."""

    outcomes: Counter[str] = field(default_factory=Counter)
    defects: dict[int, str] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def tried(self) -> int:
        return self.outcomes.total() + len(self.defects)


def fuzz(reader: Reader, seed: int, count: int, first: int = 0) -> Tally:
    """Inputs ``first`` to ``first + count`` in one process, and in another where that one dies or hangs."""
    tally, end = Tally(), first + count
    with tempfile.TemporaryDirectory(prefix="clasp-fuzz-") as folder:
        progress = Path(folder, "progress")
        while first < end:
            progress.write_bytes(b"")
            process = os.fork()
            if not process:
                _work(reader, seed, range(first, end), Path(folder))
            reason = _watch(process, progress)
            reports = list(_reports(progress))
            for number, outcome, defect, peak in reports:
                tally.peak_bytes = max(tally.peak_bytes, peak)
                if defect:
                    tally.defects[number] = defect
                elif outcome:
                    tally.outcomes[outcome] += 1
            first = max([first, *(number + 1 for number, outcome, defect, _ in reports if outcome or defect)])
            if reason and first < end:
                tally.defects[first] = reason
                first += 1
    return tally


def _watch(process: int, progress: Path) -> str:
    """Why a process ended before its inputs did; empty if it did not."""
    size, since, used = 0, time.monotonic(), 0.0
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return "" if code == 0 else f"the process died of {signal.Signals(-code).name if code < 0 else code}"
        now = progress.stat().st_size
        if now != size:
            size, since, used = now, time.monotonic(), _cpu_seconds(process)
        elif _cpu_seconds(process) - used > CPU_LIMIT or time.monotonic() - since > WALL_LIMIT:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return f"hangs: {_cpu_seconds(process) - used:.0f} s of the processor"
        time.sleep(0.02)


def _cpu_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _reports(progress: Path) -> Iterator[tuple[int, str, str, int]]:
    with progress.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except (EOFError, pickle.UnpicklingError):
                return


def _work(reader: Reader, seed: int, numbers: range, folder: Path) -> None:
    """In the child: reports each input before and after; never returns."""
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        warnings.simplefilter("ignore")
        runs: list[str] = []
        read = reader.prepare(Path(tempfile.mkdtemp(dir=folder)))
        sys.addaudithook(lambda event, args: _note(runs, event, args))
        pa.allocate_buffer(1)  # Arrow reserves addresses for a gigabyte at its first allocation, and uses few
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, resource.RLIM_INFINITY))
        with (folder / "progress").open("ab", buffering=0) as progress:
            for number in numbers:
                outcome, defect = _attempt(reader, read, random.Random(f"{seed} {reader.name} {number}"), folder, runs)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                progress.write(pickle.dumps((number, outcome, defect, peak)))
        code = 0
    except BaseException:
        (folder / "broken").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _note(runs: list[str], event: str, args: tuple[Any, ...]) -> None:
    if event in _RUNS or (event == "import" and args and str(args[0]).startswith(CANARY)):
        runs.append(f"{event} {args[:2]!r:.100}")


def _attempt(
    reader: Reader, read: Callable[[random.Random, Path], str], chance: random.Random, folder: Path, runs: list[str]
) -> tuple[str, str]:
    """The outcome of one input, or its defect."""
    outcome, defect = "", ""
    with _scratch(folder) as scratch:
        try:
            outcome = read(chance, scratch)
        except (UserError, ImageError) as error:
            outcome = REFUSED if isinstance(error, UserError) else BAD_SAMPLE
            if "\n" in str(error) and isinstance(error, UserError):
                defect = f"more than one line: {str(error)[:200]!r}"
        except BaseException as error:
            places = [
                f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
            ]
            defect = f"{type(error).__name__}: {' '.join(str(error).split())[:150]} ({' > '.join(places[-4:])})"
    if runs:
        defect = f"runs code: {runs[0]}"
        runs.clear()
    return ("", defect) if defect else (outcome, "")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)
