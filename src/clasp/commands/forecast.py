"""The measured forecast of a run: seconds by stage, peak memory, disk, energy; from a few steps on part of its pairs.

Input: a recipe, its pairs, its plan and the plans of its feature caches. Output: a ``CheckReport``. Note: the features
of the part are computed in a temporary folder, so nothing is kept; seconds per image, caption, step and evaluation are
extrapolated to all; what the first evaluation computes once counts as features. Energy is that of a second of the part,
loading included, times the seconds. Not in them: loading, the closed form of heads, and images that a disk reads slower
when there are many. Disk is counted, not measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from clasp.commands.step_timing import time_steps
from clasp.config.build import build_model
from clasp.config.datasets import TrainValPairs
from clasp.config.recipe import Recipe
from clasp.data.checks import CheckReport
from clasp.data.pairs import Pairs
from clasp.errors import counted
from clasp.models.cache_policy import CachePlan
from clasp.training.cost.ledger import format_si
from clasp.training.cost.meters import EnergyMeter, PeakMemoryMeter
from clasp.training.distributed import Processes
from clasp.training.loop import count_evaluations
from clasp.training.settings import TrainPlan
from clasp.training.state import copies_in_state
from clasp.types import ProgressCallback, ProgressFactory

_PROBE_BATCHES, _MIN_PROBE_PAIRS, _MAX_PROBE_VAL_PAIRS = 2, 64, 256


def check_forecast(
    recipe: Recipe, pairs: TrainValPairs, plan: TrainPlan, caches: Sequence[CachePlan], bar: ProgressFactory
) -> CheckReport:
    """Train a few steps on part of the pairs; the model is discarded."""
    train, val = (
        _some(pairs[0], max(_PROBE_BATCHES * plan.batch_size, _MIN_PROBE_PAIRS)),
        _some(pairs[1], _MAX_PROBE_VAL_PAIRS),
    )
    fixed = recipe.model_copy(update={"train": plan.resolved(recipe.train)})
    rates, memory, energy = _SecondsPerRow(bar), PeakMemoryMeter(Processes().device), EnergyMeter()
    began = time.perf_counter()
    with TemporaryDirectory() as folder, _measuring(memory, energy):
        timing = time_steps(fixed, (train, val), rates.timed_bar, cache=Path(folder))
        probe_seconds, probe_energy = time.perf_counter() - began, energy.measurement
    evaluation = timing.evaluation * len(pairs[1]) / len(val)
    seconds = {
        "features": sum(images_or_captions(cache) * rates.of(cache.what) for cache in caches if cache.bytes_to_write),
        "training": plan.steps * timing.step,
        "evaluation": count_evaluations(fixed.train) * evaluation,
    }
    peak = memory.measurement
    facts = {"seconds": seconds, "step_seconds": timing.step, "peak_bytes": peak.value, "peak": peak.method}
    kwh = None if probe_energy.value is None else probe_energy.value / probe_seconds * sum(seconds.values())
    facts |= {"disk_bytes": forecast_disk(fixed, caches), "energy_kwh": kwh, "energy": probe_energy.method}
    report = CheckReport("forecast", {**facts, "measured_on": {"train": len(train), "val": len(val)}})
    stages = ", ".join(f"{name} {spent:,.0f}" for name, spent in seconds.items())
    steps = f"{counted(plan.steps, 'step')} of {timing.step:.3g} s"
    report.add_finding(
        "ok", f"about {sum(seconds.values()):,.0f} s: {stages} ({steps}, measured on {counted(len(train), 'pair')})"
    )
    if peak.value is not None:
        report.add_finding("ok", f"peak memory {format_si(peak.value, 'B')}, model and all, beyond that of the doctor")
    parts = ", ".join(f"{name} {format_si(size, 'B')}" for name, size in facts["disk_bytes"].items())
    report.add_finding("ok", f"disk: {parts}; the states are deleted at the end")
    if kwh is not None:
        report.add_finding("ok", f"energy {1000 * kwh:.3g} Wh: {probe_energy.method}")
    return report


@contextmanager
def _measuring(memory: PeakMemoryMeter, energy: EnergyMeter) -> Iterator[None]:
    """Both meters run, and are stopped whatever happens."""
    memory.start()
    energy.start()
    try:
        yield
    finally:
        energy.stop()
        memory.stop()


def forecast_disk(recipe: Recipe, caches: Sequence[CachePlan]) -> dict[str, int]:
    """Bytes that a run writes: its feature cache, the last two training states, its delta; all in float32."""
    delta = 4 * build_model(recipe, meta=True).parameter_counts()["model"].trained
    copies = copies_in_state(recipe.train.select, stepped=True)
    return {"features": sum(cache.bytes_to_write for cache in caches), "states": 2 * copies * delta, "delta": delta}


def images_or_captions(cache: CachePlan) -> int:
    """How many inputs of a tower a cache takes: captions, or images in all their views."""
    return cache.count * cache.key.get("views", 1)


def _some(pairs: Pairs, most: int) -> Pairs:
    """Evenly spaced pairs, at most ``most``."""
    count = min(most, len(pairs))
    return Pairs(pairs.name, [[pairs[number * len(pairs) // count] for number in range(count)]])


class _SecondsPerRow:
    """Measures the seconds that an image or a caption takes through the frozen part of its tower, by progress bars."""

    def __init__(self, bar: ProgressFactory):
        self._bar = bar
        self._spent: dict[str, tuple[float, int]] = {}

    @contextmanager
    def timed_bar(self, title: str) -> Iterator[ProgressCallback]:
        """A bar whose first word says of what its rows are."""
        what, began, rows = title.partition(" ")[0], time.perf_counter(), 0

        def count(done: int, total: int) -> None:
            nonlocal rows
            rows = total
            progress(done, total)

        with self._bar(title) as progress:
            yield count
        if rows:
            seconds, before = self._spent.get(what, (0.0, 0))
            self._spent[what] = seconds + time.perf_counter() - began, before + rows

    def of(self, what: str) -> float:
        """Seconds of a row; 0 where none was computed."""
        seconds, rows = self._spent.get(what, (0.0, 1))
        return seconds / rows
