"""The page of ``benchmarks.quality``: curves of both sides, when either had a quality, tables and a figure.

Input: races, each the curves of one seed. Output: rows of the time to the peer's best, ``quality.md`` as text, and
``quality.png``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness
from benchmarks.harness import Measured, Row
from clasp.evaluation.results import EvaluationResult

METRICS = ("top1", "top5")
TARGET = 0.33  # of the peer's time
PEER = "VisionTextDualEncoder + peft LoRA r=8"


class Point(NamedTuple):
    """Validation metrics, fractions, after some seconds of wall time."""

    seconds: float
    top1: float
    top5: float


@dataclass
class Curve:
    """The evaluations of one run, in order."""

    name: str
    points: list[Point] = field(default_factory=list)

    def best_so_far(self, metric: str) -> list[float]:
        """The highest value up to each point: the weights of the best evaluation are those that a run keeps."""
        values, best = [], 0.0
        for point in self.points:
            best = max(best, getattr(point, metric))
            values.append(best)
        return values

    def seconds_to(self, metric: str, value: float) -> float | None:
        """The time of the first evaluation that reaches ``value``; ``None`` where none does."""
        return next((point.seconds for point in self.points if getattr(point, metric) >= value), None)


@dataclass
class Race:
    """Curves of one seed, ours by budget and the peer's by learning rate, and each side on the test photos."""

    seed: int
    ours: list[Curve]
    peers: dict[float, Curve]
    tests: dict[str, EvaluationResult] = field(default_factory=dict)


class Reached(NamedTuple):
    """Seconds to the best value of the peer, infinite where clasp never had it, and our first run to have it."""

    value: float
    clasp: float
    peer: float
    run: str


@dataclass
class Outcome:
    """The races, the peer's learning rate that is compared, the seconds it was given, and what was measured where."""

    races: list[Race]
    chosen: float
    given: float
    facts: str

    def reached(self, metric: str) -> list[Reached]:
        """When either side first had the best value of the chosen peer, by race."""
        found = []
        for race in self.races:
            peer = race.peers[self.chosen]
            value = max(getattr(point, metric) for point in peer.points)
            seconds = {curve.name: curve.seconds_to(metric, value) for curve in race.ours}
            times = {name: time for name, time in seconds.items() if time is not None}
            theirs = peer.seconds_to(metric, value)
            assert theirs is not None
            if times:
                run = min(times, key=lambda name: times[name])
                found.append(Reached(value, times[run], theirs, run))
            else:
                best = max(getattr(point, metric) for curve in race.ours for point in curve.points)
                found.append(Reached(value, float("inf"), theirs, f"not reached: {100 * best:.1f} % at most"))
        return found

    def rows(self) -> list[Row]:
        """Two rows a metric, with medians over the races; the note names our runs."""
        rows = []
        for metric in METRICS:
            races = self.reached(metric)
            values = ", ".join(f"{100 * race.value:.1f}" for race in races)
            clasp = Measured("", tuple(race.clasp for race in races))
            notes = ", ".join(dict.fromkeys(race.run for race in races))
            work = f"time to {metric} {values} % on held-out photos, the peer's best of {self.given / 60:g} minutes"
            peer = f"{PEER}, lr {self.chosen:g}"
            for name, times in (
                ("the time it was given", (self.given,)),
                ("its first time there", tuple(race.peer for race in races)),
            ):
                theirs = Measured("", times)
                rows.append(Row(work, "s", clasp, f"{peer}: {name}", theirs, TARGET, "lower", notes))
        return rows

    def markdown(self) -> str:
        """The page."""
        lines = ["seed | run | seconds to its last evaluation | top-1 on held-out photos, at best | top-5"]
        tests = ["seed | test photos | n | top-1 | 95 % interval | top-5"]
        for race in self.races:
            for curve in (*race.ours, *race.peers.values()):
                mark = " (chosen)" if curve is race.peers[self.chosen] and len(race.peers) > 1 else ""
                best = [f"{100 * max(getattr(point, metric) for point in curve.points):.1f}" for metric in METRICS]
                cells = [str(race.seed), f"{curve.name}{mark}", f"{curve.points[-1].seconds:.0f}", *best]
                lines.append(" | ".join(cells))
            for name, row in race.tests.items():
                low, high = row.interval["top1"]
                cells = [str(race.seed), name, f"{row.n:,}", f"{100 * row.metrics['top1']:.1f}"]
                tests.append(
                    " | ".join([*cells, f"{100 * low:.1f} to {100 * high:.1f}", f"{100 * row.metrics['top5']:.1f}"])
                )
        for part in (lines, tests):
            part.insert(1, " | ".join(["---"] * len(part[0].split(" | "))))
        tables = ["\n".join(f"| {line} |" for line in part) for part in (lines, tests)]
        parts = ["# Quality against wall time", self.facts, harness.table(self.rows()), *tables, "![](quality.png)"]
        return "\n\n".join(parts) + "\n"


def draw(outcome: Outcome, path: Path) -> None:
    """The best value so far against seconds, one panel for each metric; names for the first race alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(METRICS), figsize=(9, 3.6), layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for race in outcome.races:
            drawn = [(curve, "C0", 1.0 + place) for place, curve in enumerate(race.ours)]
            drawn += [(curve, "C1" if lr == outcome.chosen else "0.75", 2.0) for lr, curve in race.peers.items()]
            for curve, colour, width in drawn:
                values = [100 * value for value in curve.best_so_far(metric)]
                seconds = [point.seconds for point in curve.points]
                name = curve.name if race is outcome.races[0] else None
                axis.step(seconds, values, where="post", color=colour, lw=width, marker="o", ms=3, label=name)
        axis.set(xlabel="seconds since the start of the process", ylabel=f"zero-shot {metric}, %", xlim=(0, None))
        axis.set_ylim(0, None)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)
