"""Heads only, epochs after the first: clasp reads cached features of the frozen towers, the peers encode every pair
again.

Peers get pixels and token ids from memory, captions padded to the longest of the batch only; clasp's time includes
looking up features and assembling batches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness, peer_models, sample_data
from benchmarks.harness import Contestant, Row, sized
from benchmarks.peer_models import Rival
from benchmarks.peers import attempt
from clasp.plain_types import Precision

BATCH = sized(128, 8)
PAIRS = sized(1024, 32)
EPOCHS = sized(20, 2)
TARGET = 500


def rows() -> Sequence[Row]:
    return [row for precision in harness.precisions() for row in compare(precision)]


def compare(precision: Precision) -> list[Row]:
    towers = sample_data.untouched()
    plain = sample_data.plain(towers, BATCH)
    batch = (plain.pixels, *plain.tokens(range(BATCH)))

    def locked_open_clip() -> Rival:
        model = peer_models.open_clip_model(towers)
        model.lock_image_tower()
        model.lock_text_tower()
        return peer_models.open_clip_rival(model, precision)

    def frozen_dual_encoder() -> Rival:
        model = peer_models.dual_encoder(towers)
        model.vision_model.requires_grad_(False)
        model.text_model.requires_grad_(False)
        return peer_models.dual_encoder_rival(model, example=False, precision=precision)

    made = {
        "open_clip, both towers locked": attempt(locked_open_clip),
        "VisionTextDualEncoder, both towers frozen": attempt(frozen_dual_encoder),
    }
    with tempfile.TemporaryDirectory() as cache:
        given = (sample_data.recipe(), sample_data.pairs(PAIRS))
        ours = sample_data.Ours(*given, batch=BATCH, cache=Path(cache), precision=precision)
        contestants = [Contestant("clasp", lambda: sum(ours.epoch() for _ in range(EPOCHS)))]
        for name, rival in made.items():
            if isinstance(rival, Rival):
                contestants.append(Contestant(name, lambda rival=rival: rival.step(*batch)))
        rates = harness.race(contestants)
        bound = harness.profiled(ours.epoch)
    work, found = "heads only, epochs after the first", []
    for name, rival in made.items():
        note = rival if isinstance(rival, str) else f"batch {BATCH}"
        theirs = rates.get(name)
        found.append(Row(work, "pairs/s", rates["clasp"], name, theirs, TARGET, "higher", note, bound, precision))
    return found


if __name__ == "__main__":
    harness.main(rows)
