"""LiT (image tower frozen, text tower fully tuned), the first epoch: clasp against open_clip with ``--lock-image``.

In the first epoch the feature cache is empty: clasp encodes every image once to fill it, as open_clip does in its
steps. clasp's time includes reading and decoding the images; open_clip has its pixels in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import harness, peer_models, sample_data
from benchmarks.harness import Contestant, Row, sized
from benchmarks.peer_models import OPEN_CLIP_LENGTH, Rival
from benchmarks.peers import attempt
from clasp.plain_types import Precision

BATCH = sized(64, 8)
PAIRS = sized(128, 16)
TARGET = 1.5


def rows() -> Sequence[Row]:
    return [row for precision in harness.precisions() for row in compare(precision)]


def compare(precision: Precision) -> list[Row]:
    towers = sample_data.untouched()
    plain = sample_data.plain(towers, PAIRS)
    recipe = sample_data.recipe('tune.text=["full"]')
    ours = sample_data.Ours(recipe, sample_data.pairs(PAIRS), batch=BATCH, cache=Path(), precision=precision)

    def first_epoch() -> int:
        with tempfile.TemporaryDirectory() as cache:  # an empty cache
            ours.cache = Path(cache)
            return ours.epoch(ours.read())

    def lock_image() -> Rival:
        model = peer_models.open_clip_model(towers)
        model.lock_image_tower()
        return peer_models.open_clip_rival(model, precision)

    rival = attempt(lock_image)

    def epoch(length: int | None) -> Callable[[], int]:
        def run() -> int:
            assert isinstance(rival, Rival)
            parts = [range(start, start + BATCH) for start in range(0, PAIRS, BATCH)]
            return sum(rival.step(plain.pixels[part.start : part.stop], *plain.tokens(part, length)) for part in parts)

        return run

    lengths = {
        f"open_clip --lock-image (captions padded to {OPEN_CLIP_LENGTH}, as it does)": (OPEN_CLIP_LENGTH, TARGET),
        "the same, captions padded to the longest of the batch, as it does not": (None, None),
    }
    contestants = [Contestant("clasp", first_epoch)]
    if isinstance(rival, Rival):
        contestants += [Contestant(name, epoch(length)) for name, (length, _) in lengths.items()]
    rates = harness.race(contestants)
    bound = harness.profiled(first_epoch)
    note = rival if isinstance(rival, str) else f"batch {BATCH}, {PAIRS} pairs"
    found = []
    for name, (_, target) in lengths.items():
        theirs = rates.get(name)
        row = Row("LiT, first epoch", "pairs/s", rates["clasp"], name, theirs, target, "higher", note, bound, precision)
        found.append(row)
    return found


if __name__ == "__main__":
    harness.main(rows)
