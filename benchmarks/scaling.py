"""Scaling of time and memory with pairs, batch, trained blocks and tokens, against the expected linear growth.

Plotted to ``scaling.png``. The expected time is the FLOPs counted at each point at the FLOP rate of the largest one;
the expected memory is that of the largest per pair, block or token. Points above the line show overhead without FLOPs:
calls, small products, batch assembly.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks import harness, sample_data
from benchmarks.harness import Measured, Row, quick, sized
from clasp.training.cost.flops import count_total_flops
from clasp.training.memory import ActivationMemory
from clasp.types import Tokens

FIGURE = Path(__file__).parent / "scaling.png"
PAIRS = (64, 128) if quick() else (128, 256, 512, 1024)
BATCHES = (2, 4) if quick() else (4, 8, 16, 32)
BLOCKS = (1, 12) if quick() else (1, 2, 4, 8, 12)
LENGTHS = (8, 16) if quick() else (8, 16, 32, 64, 128)
ROWS = sized(32, 4)


@dataclass(frozen=True)
class Point:
    """The measurements at one size: seconds, FLOPs, bytes."""

    size: int
    seconds: Measured
    flops: int
    bytes: int


@dataclass(frozen=True)
class Growth:
    """One curve: its axis, its work, and its points by rising size."""

    along: str
    work: str
    memory: str
    points: tuple[Point, ...]

    def expected_seconds(self) -> list[float]:
        last = self.points[-1]
        return [last.seconds.median * point.flops / last.flops for point in self.points]

    def expected_bytes(self) -> list[float]:
        last = self.points[-1]
        return [last.bytes * point.size / last.size for point in self.points]


def rows() -> Sequence[Row]:
    curves = [with_pairs(), with_batch(), with_blocks(), with_length()]
    if not quick():
        draw(curves, FIGURE)
    return [row for curve in curves for row in (of_time(curve), of_memory(curve))]


def with_pairs() -> Growth:
    """Heads only: an epoch from the feature cache, and the size of the cache."""

    def point(count: int) -> Point:
        with tempfile.TemporaryDirectory() as cache:
            ours = sample_data.Ours(sample_data.recipe(), sample_data.pairs(count), batch=32, cache=Path(cache))
            flops, taken = count_total_flops(ours.epoch), harness.seconds(ours.epoch)
            kept = sum(path.stat().st_size for path in Path(cache).rglob("*.npy"))
        return Point(count, taken, flops, kept)

    return Growth("pairs", "an epoch, heads only, from the cache", "feature cache", tuple(map(point, PAIRS)))


def with_batch() -> Growth:
    """Both towers fully tuned: a step, and its activation memory."""

    def point(size: int) -> Point:
        return step_of(['tune.image=["full"]', 'tune.text=["full"]'], size, size)

    return Growth("batch", "a step, both towers whole", "kept for backward", tuple(map(point, BATCHES)))


def with_blocks() -> Growth:
    """The top blocks of the image tower tuned, without a cache; the text tower frozen."""

    def point(count: int) -> Point:
        return step_of([f'tune.image=["last({count})"]'], sized(16, 2), count)

    work = "a step, top blocks of the image tower"
    return Growth("blocks trained", work, "kept for backward", tuple(map(point, BLOCKS)))


def step_of(changes: list[str], batch: int, size: int) -> Point:
    recipe = sample_data.recipe(*changes, "data.feature_cache=off")
    ours = sample_data.Ours(recipe, sample_data.pairs(batch), batch=batch, cache=Path(tempfile.gettempdir()))
    given = next(iter(ours.batches.epoch(0)))

    def run() -> int:
        return ours.step(given)

    return Point(size, harness.seconds(run), count_total_flops(run), ours.kept(given))


def with_length() -> Growth:
    """The text tower alone, fully tuned, by caption length."""
    tower = sample_data.parts(sample_data.recipe('tune.text=["full"]')).model.text

    def point(length: int) -> Point:
        ids = torch.full((ROWS, length), 2000)
        given = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

        def run() -> None:
            tower.zero_grad()
            tower.pooled(given).sum().backward()

        with ActivationMemory(tower.parameters()) as kept:
            tower.pooled(given)
        return Point(length, harness.seconds(run), count_total_flops(run), kept.bytes)

    work = f"text tower, forward and backward, {ROWS} captions"
    return Growth("tokens", work, "kept for backward", tuple(map(point, LENGTHS)))


def of_time(curve: Growth) -> Row:
    """The time at the smallest size, farthest from the largest, from which the expectation is extrapolated."""
    first, note = curve.points[0], f"{curve.along} {[point.size for point in curve.points]}"
    expected = Measured("", (curve.expected_seconds()[0],))
    work = f"{curve.work}: time at {curve.along} = {first.size}"
    return Row(work, "s", first.seconds, "its FLOPs at the rate of the largest", expected, None, "lower", note)


def of_memory(curve: Growth) -> Row:
    first = curve.points[0]
    ours, expected = Measured("", (1e-6 * first.bytes,)), Measured("", (1e-6 * curve.expected_bytes()[0],))
    work = f"{curve.work}: {curve.memory} at {curve.along} = {first.size}"
    return Row(work, "MB", ours, "in proportion to the largest", expected, None, "lower")


def draw(curves: Sequence[Growth], path: Path) -> None:
    """One column per curve, time above memory; dots are measured, lines expected."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(curves), figsize=(4 * len(curves), 6.4), layout="constrained")
    for column, curve in enumerate(curves):
        sizes = [point.size for point in curve.points]
        low, middle, high = ([choose(point.seconds.values) for point in curve.points] for choose in (min, median, max))
        above, below = axes[0, column], axes[1, column]
        around = [[m - n for m, n in zip(middle, low, strict=True)], [n - m for m, n in zip(middle, high, strict=True)]]
        above.errorbar(sizes, middle, around, fmt="o", color="C0", label="measured, lowest to highest")
        above.plot(sizes, curve.expected_seconds(), color="0.5", label="FLOPs counted")
        below.plot(sizes, [1e-6 * point.bytes for point in curve.points], "o", color="C1", label="measured")
        below.plot(sizes, [1e-6 * each for each in curve.expected_bytes()], color="0.5", label="in proportion")
        above.set_title(curve.work, fontsize=9)
        for axis, unit in ((above, "seconds"), (below, f"MB, {curve.memory}")):
            axis.set(xlabel=curve.along, ylabel=unit, xlim=(0, None), ylim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    harness.main(rows)
