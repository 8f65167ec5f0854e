"""FLOPs utilisation of the training step: FLOP/s of a step that tunes both towers, against the machine's.

The FLOPs of a step are counted, not estimated, and its rate is compared with that of large square matrix products of
the same precision measured in alternation with it. Other operations (norms, GELU, softmax, the optimizer) take time and
count no FLOPs, so 100 % cannot be reached. Note: LoRA in bfloat16 is in ``benchmarks.bfloat16``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness, sample_data
from benchmarks.harness import Contestant, Row, sized
from clasp.plain_types import Precision
from clasp.training.cost.flops import count_total_flops

BATCH = sized(64, 4)
TARGET = 0.6
EVERY_WEIGHT, LOW_RANK = ("full", "both towers, every weight"), ("lora(r=8)", "low-rank, both towers")
TUNED: dict[Precision, tuple[tuple[str, str], ...]] = {"bfloat16": (EVERY_WEIGHT,), "float32": (EVERY_WEIGHT, LOW_RANK)}


def rows() -> Sequence[Row]:
    return [compare(work, spec, precision) for precision in harness.precisions() for spec, work in TUNED[precision]]


def compare(work: str, spec: str, precision: Precision) -> Row:
    recipe = sample_data.recipe(f'tune.image=["{spec}"]', f'tune.text=["{spec}"]', "data.feature_cache=off")
    with tempfile.TemporaryDirectory() as cache:
        ours = sample_data.Ours(recipe, sample_data.pairs(BATCH), batch=BATCH, cache=Path(cache), precision=precision)
        batch = next(iter(ours.batches.epoch(0)))
        flops = count_total_flops(lambda: ours.step(batch))

        def step() -> int:
            ours.step(batch)
            return 1

        rates = harness.race([Contestant("clasp", step), harness.products(precision)])
        profile = harness.profiled(step)
    work = f"training step, {work}, batch {BATCH}"
    return harness.share_of_machine(work, flops, rates["clasp"], rates["products"], TARGET, profile, precision)


if __name__ == "__main__":
    harness.main(rows)
