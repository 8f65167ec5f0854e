"""The page of ``benchmarks.quality``: curves of both sides, when either had a quality, tables and a figure.

    python -m benchmarks.quality_page        # draws the figure again from the races that are kept

Input: races, each the curves of one seed, kept in ``quality.jsonl`` as they end. Output: rows of the time to the peer's
best, ``quality.md`` as text, and ``quality.png``.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.harness import Measured, Row
from clasp.evaluation.results import EvaluationResult

METRICS = ("top1", "top5")
TARGET = 0.33  # of the peer's time
RACES_FILE = "quality.jsonl"
_MINUTES = (0.25, 0.5, 1, 2, 5, 10)  # ticks
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


def append_race(path: Path, race: Race, settings: dict[str, Any]) -> None:
    """Add a race to the file that keeps them, as it ends; without the test photos, which are read after the last."""
    curves = {
        "ours": [[curve.name, curve.points] for curve in race.ours],
        "peers": [[lr, curve.name, curve.points] for lr, curve in race.peers.items()],
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"settings": settings, "seed": race.seed, **curves}) + "\n")


def read_races(path: Path, settings: dict[str, Any] | None = None) -> list[Race]:
    """The races with these settings, those of the last line by default; of races with one seed the last."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    wanted = settings if settings is not None else rows[-1]["settings"] if rows else None
    found = {}
    for row in rows:
        if row["settings"] == wanted:
            ours = [Curve(name, [Point(*point) for point in points]) for name, points in row["ours"]]
            peers = {lr: Curve(name, [Point(*point) for point in points]) for lr, name, points in row["peers"]}
            found[row["seed"]] = Race(row["seed"], ours, peers)
    return list(found.values())


def choose_rate(races: Sequence[Race]) -> float:
    """The peer's learning rate of the highest top-1 on the held-out photos, on average over the races."""
    return max(races[0].peers, key=lambda lr: sum(race.peers[lr].best_so_far("top1")[-1] for race in races))


def draw(races: Sequence[Race], path: Path) -> None:
    """The best value so far against minutes, on a logarithmic axis; a panel for each metric, a line style a seed.

    Ours are runs of different budgets: the end of each is marked, and the ends are joined. The dotted line is the
    peer's best, which ours are asked to reach.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = choose_rate(races)
    figure, axes = pyplot.subplots(1, len(METRICS), figsize=(10, 4.2), layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for race, style in zip(races, itertools.cycle(("-", "--", ":", "-."))):
            _draw_race(axis, race, metric, chosen, style)
        axis.set_xscale("log")
        axis.set_xticks(_MINUTES, labels=[f"{minutes:g}" for minutes in _MINUTES])
        axis.minorticks_off()
        axis.set(xlabel="minutes since the start of the process", ylabel=f"zero-shot {metric}, %", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_race(axis: Any, race: Race, metric: str, chosen: float, style: str) -> None:
    ends = []
    for curve in race.ours:
        minutes, values = _curve(curve, metric)
        axis.step(minutes, values, where="post", color="C0", lw=0.8, ls=style, alpha=0.35)
        ends.append((minutes[-1], values[-1]))
    axis.plot(
        *zip(*ends, strict=True),
        color="C0",
        lw=2,
        ls=style,
        marker="o",
        label=f"clasp, a run a budget, seed {race.seed}",
    )
    for lr, curve in race.peers.items():
        minutes, values = _curve(curve, metric)
        if lr != chosen:
            axis.step(minutes, values, where="post", color="0.8", lw=1, ls=style)
            continue
        axis.step(minutes, values, where="post", color="C1", lw=2, ls=style, label=f"{PEER}, seed {race.seed}")
        axis.axhline(values[-1], color="C1", lw=0.8, ls=":")


def _curve(curve: Curve, metric: str) -> tuple[list[float], list[float]]:
    """Minutes, and the best per cent up to each."""
    return [point.seconds / 60 for point in curve.points], [100 * value for value in curve.best_so_far(metric)]


def main() -> None:
    """Draw ``quality.png`` again from ``quality.jsonl`` in the folder given, that of this file by default."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    races = read_races(folder / RACES_FILE)
    if not races:
        sys.exit(f"there is no race in {folder / RACES_FILE}; python -m benchmarks.quality writes it")
    draw(races, folder / "quality.png")


if __name__ == "__main__":
    main()
