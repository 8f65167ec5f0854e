"""A deep adapter, or the top two blocks, in both towers: epochs after the first, with and without the feature cache.

Both sides are clasp, with and without ``data.feature_cache``: without it, images are decoded and the frozen blocks are
run in every step. The FLOPs of both are counted, which gives the maximum speed-up of a cache: the target is 0.95 of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness, sample_data
from benchmarks.harness import Contestant, Row, sized
from clasp.plain_types import Precision
from clasp.training.cost.flops import count_total_flops

BATCH = sized(64, 8)
PAIRS = sized(256, 16)
SHARE = 0.95  # of what the FLOPs allow
TUNED = {"deep adapter (one new block on top)": "deep(1)", "top 2 blocks": "last(2)"}


def rows() -> Sequence[Row]:
    return [compare(work, spec, precision) for precision in harness.precisions() for work, spec in TUNED.items()]


def compare(work: str, spec: str, precision: Precision) -> Row:
    recipe = sample_data.recipe(f'tune.image=["{spec}"]', f'tune.text=["{spec}"]')
    with tempfile.TemporaryDirectory() as cache:
        made = {
            features: sample_data.Ours(
                recipe.with_overrides([f"data.feature_cache={features}"]),
                sample_data.pairs(PAIRS),
                batch=BATCH,
                cache=Path(cache),
                precision=precision,
            )
            for features in ("float16", "off")
        }
        for ours in made.values():
            assert len(ours.batches)  # fills the cache
        rates = harness.race(
            [
                Contestant("cached", made["float16"].epoch),
                # one step without the cache is enough
                Contestant("off", lambda: made["off"].epoch(most=1)),
            ]
        )
        flops = {name: count_total_flops(lambda ours=ours: ours.epoch(most=1)) for name, ours in made.items()}
        profile = harness.profiled(made["float16"].epoch)
    most = flops["off"] / flops["float16"]
    bound = f"arithmetic, which allows {most:.2f}; {profile}"
    name = "the same, data.feature_cache=off"
    note = f"batch {BATCH}; states kept in float16; {most:.2f} × the FLOPs without"
    target = round(SHARE * most, 2)
    return Row(work, "pairs/s", rates["cached"], name, rates["off"], target, "higher", note, bound, precision)


if __name__ == "__main__":
    harness.main(rows)
