"""InfoNCE of a large batch, E = 512, forward and backward: time and memory against a naive loss and open_clip's.

The naive loss computes the B x B logits once, open_clip's local loss twice; clasp computes them in tiles, twice, so its
FLOPs are 4/3 of the naive ones. Each peak is measured in its own process. Where the naive loss does not fit in memory,
its peak is extrapolated from the largest batch at which it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Contestant, Measured, Peak, Row, sized
from benchmarks.peers import attempt, imported
from clasp.training.losses import info_nce
from clasp.training.memory import free_bytes

WIDTH = 512
LARGEST = sized(32768, 1024)
TIMED, MEASURED = sized(8192, 256), sized(16384, 512)
SLOWER, SMALLER = 1.4, 1 / 20
MATRICES = 5  # B x B float32 matrices allowed for the naive loss; measured: 4.1
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]


def clasp(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return info_nce(image, text, scale).total


def naive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def open_clip() -> LossOf:
    return imported("open_clip").ClipLoss(local_loss=True)


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors and a scale, with gradients already allocated: common to all contestants."""
    generator = torch.Generator().manual_seed(0)
    sides = [F.normalize(torch.randn(batch, WIDTH, generator=generator), dim=1) for _ in range(2)]
    given = (sides[0], sides[1], torch.tensor(50.0))
    for tensor in given:
        tensor.requires_grad_()
        tensor.grad = torch.full_like(tensor, 1e-9)  # written, so that it counts as initial usage
    return given


def run(loss: LossOf, given: tuple[Tensor, Tensor, Tensor]) -> int:
    """Forward and backward."""
    loss(*given).backward()
    return 1


def rows() -> Sequence[Row]:
    return [*times(TIMED), *memory()]


def times(batch: int) -> list[Row]:
    peer, given = attempt(open_clip), inputs(batch)
    losses: dict[str, LossOf | str] = {"clasp": clasp, "naive": naive, "open_clip's local loss": peer}
    contestants = [
        Contestant(name, partial(run, loss, given)) for name, loss in losses.items() if not isinstance(loss, str)
    ]
    rates = harness.race(contestants)
    taken = {name: Measured(name, tuple(1 / rate for rate in measured.values)) for name, measured in rates.items()}
    bound = harness.profiled(contestants[0].run)
    return [
        Row(f"InfoNCE, B = {batch:,}", "s", taken["clasp"], name, taken.get(name), SLOWER, "lower", note, bound)
        for name, note in (
            ("naive", "its arithmetic is 3/4 of ours"),
            ("open_clip's local loss", peer if isinstance(peer, str) else "one process; its arithmetic is 3/2 of ours"),
        )
    ]


def memory() -> list[Row]:
    """Peaks beyond the initial usage, which includes the inputs and their gradients."""
    at = MEASURED
    ours, theirs = peak_at("clasp", at), {name: peak_at(name, at) for name in ("naive", "open_clip")}
    found = [compare(at, ours, name, peak, None) for name, peak in theirs.items()]
    free, needs = free_bytes(torch.device("cpu")) or 0, MATRICES * 4 * LARGEST**2
    ours = peak_at("clasp", LARGEST)
    if needs < free:
        return [*found, compare(LARGEST, ours, "naive", peak_at("naive", LARGEST), SMALLER)]
    naive = theirs["naive"]
    if isinstance(naive, str):
        return [*found, compare(LARGEST, ours, "naive", naive, SMALLER)]
    grown = (LARGEST / at) ** 2
    note = f"not run: it may take {1e-9 * needs:.0f} GB, and {1e-9 * free:.0f} are free"
    name = f"naive, {grown:g} times its peak at {at:,}"
    return [*found, compare(LARGEST, ours, name, replace(naive, grown=grown * naive.grown), SMALLER, note)]


def peak_at(name: str, batch: int) -> Peak | str:
    return attempt(partial(harness.peak_elsewhere, "loss", f"{name}-{batch}"))


def compare(batch: int, ours: Peak | str, name: str, theirs: Peak | str, target: float | None, note: str = "") -> Row:
    assert isinstance(ours, Peak), ours
    work, mine = f"InfoNCE, B = {batch:,}: memory above its inputs", Measured("", (ours.grown,))
    if isinstance(theirs, str):
        return Row(work, "MB", mine, name, None, target, "lower", theirs)
    bound = "copies of the embeddings and three tiles, which do not grow with B²"
    return Row(work, "MB", mine, name, Measured("", (theirs.grown,)), target, "lower", note, bound)


def peak(loss: LossOf, batch: int) -> Peak:
    run(loss, inputs(64))  # warm-up
    return harness.peak_of(partial(run, loss, inputs(batch)))


def peak_of_open_clip(batch: int) -> Peak:
    return peak(open_clip(), batch)


PEAKS = {
    f"{name}-{batch}": work
    for batch in (MEASURED, LARGEST)
    for name, work in (
        ("clasp", partial(peak, clasp, batch)),
        ("naive", partial(peak, naive, batch)),
        ("open_clip", partial(peak_of_open_clip, batch)),
    )
}

if __name__ == "__main__":
    harness.main(rows, PEAKS)
