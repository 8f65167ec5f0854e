"""The benchmark harness: alternating runs, measurement, tables.

Input: contestants (a name and a callable that returns how much it processed). Output: medians over repeats with minimum
and maximum, the peak memory of some work in its own process, and rows of a table. Note: contestants alternate in one
process, so a slowdown of the machine affects all of them; a peer that cannot run is a row with its reason; and where a
target is missed, the row contains a profile of our time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch._C._profiler import _ExperimentalConfig

from benchmarks.peers import repair_torchvision
from clasp.models.precision import detect_precision
from clasp.plain_types import Precision

REPEATS = 3
PACKAGES = ("torch", "clasp-vl", "transformers", "peft", "timm", "open_clip_torch", "sentence-transformers")

Run = Callable[[], int]
"""Runs its work once and returns how much was processed: pairs, images, captions, steps."""


@dataclass(frozen=True)
class Contestant:
    """One implementation: its name in the table, and its work."""

    name: str
    run: Run


@dataclass(frozen=True)
class Measured:
    """One number per repeat, in the row's unit."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return spoken(self.median) if low == high else f"{spoken(self.median)} ({spoken(low)} to {spoken(high)})"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``ratio`` is ours to theirs. ``theirs`` is ``None`` where a peer could not run, and ``note`` is then the reason.
    ``bound`` is our bottleneck. Rows without a target are for information. ``precision``: what both sides compute in.
    """

    work: str
    unit: str
    ours: Measured
    against: str
    theirs: Measured | None
    target: float | None
    better: Literal["higher", "lower"]
    note: str = ""
    bound: str = ""
    precision: Precision = "float32"

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.ours.median / self.theirs.median

    @property
    def verdict(self) -> str:
        ratio = self.ratio
        if ratio is None:
            return "not run"
        if self.target is None:
            return ""
        reached = ratio >= self.target if self.better == "higher" else ratio <= self.target
        return "reached" if reached else "**missed**"

    def cells(self) -> list[str]:
        sign = "≥" if self.better == "higher" else "≤"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}" if self.ratio >= 0.1 else f"{self.ratio:.3f}"
        notes = [self.note, f"bound by: {self.bound}" if self.bound else ""]
        return [
            self.work if self.precision == "float32" else f"{self.work}, {self.precision}",
            self.unit,
            str(self.ours),
            self.against,
            "" if self.theirs is None else str(self.theirs),
            ratio,
            "" if self.target is None else f"{sign} {self.target:g}",
            self.verdict,
            "; ".join(part for part in notes if part),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "verdict": self.verdict.strip("*")}


HEADER = ["work", "in", "clasp", "against", "theirs", "ratio", "target", "", "what to know"]


def table(rows: Sequence[Row], header: Sequence[str] = HEADER) -> str:
    """Rows as a Markdown table."""
    lines = [list(header), ["---"] * len(header), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spoken(value: float) -> str:
    """Three significant digits, with thousands separators."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def quick() -> bool:
    """Whether scripts are only tested, at meaningless sizes (``CLASP_BENCH=quick``)."""
    return os.environ.get("CLASP_BENCH") == "quick"


def sized(full: int, tiny: int) -> int:
    """``full``, or ``tiny`` in quick mode."""
    return tiny if quick() else full


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def precisions() -> tuple[Precision, ...]:
    """What is raced on this machine: bfloat16 first where the processor computes it, and float32."""
    found = detect_precision(torch.device("cpu")).precision
    return ("bfloat16", "float32") if found == "bfloat16" or quick() else ("float32",)


# --- time ------------------------------------------------------------------------------------------------------------


def race(contestants: Sequence[Contestant], *, repeats: int = REPEATS, warm: bool = True) -> dict[str, Measured]:
    """Throughput of each per second: alternating runs, one warm-up and ``repeats`` timed ones."""
    for contestant in contestants if warm else ():
        contestant.run()
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(repeats):
        turn = number % len(contestants)  # rotate the order: the first finds a cooler machine
        for contestant in (*contestants[turn:], *contestants[:turn]):
            gc.collect()
            began = time.perf_counter()
            done = contestant.run()
            rates[contestant.name].append(done / (time.perf_counter() - began))
            print(f"  {contestant.name}: {spoken(rates[contestant.name][-1])} a second", file=sys.stderr)
    return {name: Measured(name, tuple(values)) for name, values in rates.items()}


def seconds(run: Callable[[], Any], *, repeats: int = REPEATS) -> Measured:
    """Duration in seconds, after one warm-up."""
    run()
    values = []
    for _ in range(repeats):
        gc.collect()
        began = time.perf_counter()
        run()
        values.append(time.perf_counter() - began)
    return Measured("", tuple(values))


SIZE_OF_PRODUCTS = sized(2048, 256)


def products(precision: Precision) -> Contestant:
    """Products of square matrices, four a run: the machine itself, to be raced with what is compared to it."""
    left, right = torch.randn(2, SIZE_OF_PRODUCTS, SIZE_OF_PRODUCTS).to(DTYPES[precision]).unbind()

    def run() -> int:
        for _ in range(4):
            torch.mm(left, right)
        return 4

    return Contestant("products", run)


def share_of_machine(
    work: str, flops: float, rate: Measured, machine: Measured, target: float | None, bound: str, precision: Precision
) -> Row:
    """A row of GFLOP/s: ``flops`` of each piece of work, done at ``rate``, against ``products`` at ``machine``."""
    mine = Measured("clasp", tuple(1e-9 * flops * each for each in rate.values))
    most = Measured("products", tuple(2e-9 * SIZE_OF_PRODUCTS**3 * each for each in machine.values))
    against = f"{precision} products of {SIZE_OF_PRODUCTS} × {SIZE_OF_PRODUCTS} matrices"
    return Row(work, "GFLOP/s", mine, against, most, target, "higher", "", bound, precision)


def profiled(run: Run, count: int = 4) -> str:
    """The operations with the largest share of the time, by the profiler."""
    every = _ExperimentalConfig(profile_all_threads=True)  # rows of a batch may be encoded in several
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=every) as profile:
        run()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = [f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / total:.0%}" for event in events[:count]]
    return "profile: " + ", ".join(shares)


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """Peak memory of some work, MB: of its process in total, beyond the initial usage, and saved for backward."""

    process: float
    grown: float
    kept: float = 0.0


def peak_of(work: Callable[[], Any]) -> Peak:
    """The peak resident memory while ``work`` runs in this process.

    Linux has a resettable peak; elsewhere it is that of the whole lifetime of the process.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS:")
    work()
    peak = _status("VmHWM:")
    return Peak(peak, peak - before)


def peak_elsewhere(script: str, name: str) -> Peak:
    """The peak of a named work of a script, in its own process. Raises ``RuntimeError`` with the reason of a
    failure."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--peak", name],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(_reason(done.returncode, done.stderr))
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _reason(code: int, errors: str) -> str:
    """Why a process ended: the last line of its error output, or the signal."""
    if code == -9:
        return "the process was killed: not enough memory"
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"the process ended with {code}"


def _status(name: str) -> float:
    path = Path("/proc/self/status")
    if not path.exists():
        import resource

        unit = 1e6 if sys.platform == "darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    lines = (line.split() for line in path.read_text().splitlines())
    return next(1024e-6 * int(line[1]) for line in lines if line[0] == name)


# --- the command -----------------------------------------------------------------------------------------------------


def main(rows: Callable[[], Sequence[Row]], peaks: Mapping[str, Callable[[], Peak]] | None = None) -> None:
    """The command line of a script: prints its table, ``--json`` also writes a file; ``--peak`` prints one peak as
    JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=sorted(peaks or {}))
    given = parser.parse_args()
    repair_torchvision()  # before a peer or transformers imports it
    if given.peak:
        assert peaks is not None
        print(json.dumps(asdict(peaks[given.peak]())))
        return
    found = rows()
    print(table(found))
    if given.json:
        given.json.write_text(
            json.dumps({"rows": [row.to_dict() for row in found], "cells": [r.cells() for r in found]})
        )


def machine() -> dict[str, Any]:
    """The machine of a result: processor, memory, threads, versions, date."""
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "precision": " and ".join(precisions()),
        "versions": versions,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
