"""FLOPs utilisation of the training step: FLOP/s of a step that tunes both towers fully, against the machine's.

The FLOPs of a step are counted, not estimated, and its rate is compared with that of large square float32 matrix
products measured in alternation with it. Other operations (norms, GELU, softmax, the optimizer) take time and count no
FLOPs, so 100 % cannot be reached.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness, sample_data
from benchmarks.harness import Contestant, Measured, Row, sized
from clasp.training.cost.flops import count_total_flops

BATCH = sized(64, 4)
SIZE = sized(2048, 256)
TARGET = 0.6
TUNED = {"full": "both towers, every weight", "lora(r=8)": "low-rank, both towers"}


def rows() -> Sequence[Row]:
    return [row for spec, work in TUNED.items() for row in compare(work, spec)]


def compare(work: str, spec: str) -> list[Row]:
    recipe = sample_data.recipe(f'tune.image=["{spec}"]', f'tune.text=["{spec}"]', "data.feature_cache=off")
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)

    def products() -> int:
        for _ in range(4):
            torch.mm(left, right)
        return 4

    with tempfile.TemporaryDirectory() as cache:
        ours = sample_data.Ours(recipe, sample_data.pairs(BATCH), batch=BATCH, cache=Path(cache))
        batch = next(iter(ours.batches.epoch(0)))
        flops = count_total_flops(lambda: ours.step(batch))

        def step() -> int:
            ours.step(batch)
            return 1

        rates = harness.race([Contestant("clasp", step), Contestant("products", products)])
        profile = harness.profiled(step)
    mine = Measured("clasp", tuple(1e-9 * flops * rate for rate in rates["clasp"].values))
    machine = Measured("products", tuple(2e-9 * SIZE**3 * rate for rate in rates["products"].values))
    note = f"batch {BATCH}: {1e-9 * flops:,.0f} GFLOP a step"
    against = f"products of {SIZE} × {SIZE} matrices"
    return [Row(f"training step, {work}", "GFLOP/s", mine, against, machine, TARGET, "higher", note, profile)]


if __name__ == "__main__":
    harness.main(rows)
