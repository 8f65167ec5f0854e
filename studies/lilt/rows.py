"""The rows of the claims: what trains in the towers, the heads they start from, and the learning rates to try.

Input: none. Output: ``Row``s of the tables. Note: a row's first two rates come from pilot runs; ``claims.to_choose``
goes on beyond the ends.
"""

from __future__ import annotations

from dataclasses import replace

from studies.lilt.cells import Row


def both(methods: str) -> tuple[str, ...]:
    """A row with the same tuning of both towers; ``methods`` as in a recipe's list."""
    return (f"tune.image=[{methods}]", f"tune.text=[{methods}]")


HEADS = Row("heads", (), (3e-5, 1e-4))
CLOSED = Row("heads, closed form of all pairs", (), (1e-6,), start="all")
FULL = Row("full (CLIP)", both('"full"'), (3e-5, 1e-4))
LAYERWISE = Row("adapters + norms (LwA)", both('"adapters(reduction=4)", "norms"'), (1e-3, 3e-3))
NORMS = Row("norms (LN)", both('"norms"'), (1e-3, 3e-3))
LOCKED = Row("image locked, text full (LiT)", ('tune.text=["full"]',), (3e-5, 1e-4))
BIASES = Row("biases (BitFit)", both('"biases"'), (1e-3, 3e-3))
LOW_RANK = Row("LoRA r=8", both('"lora(rank=8, alpha=8)"'), (1e-3, 3e-3))
TOP = Row("LoRA r=8, top 4 blocks", both("\"lora(rank=8, alpha=8, blocks='-4:')\""), (1e-3, 3e-3))
METHODS = (
    FULL,
    HEADS,
    CLOSED,
    LAYERWISE,
    NORMS,
    LOCKED,
    BIASES,
    LOW_RANK,
    TOP,
    Row("last block", both('"last(1)"'), (1e-4, 3e-4)),
    Row("one block more + norms (DA)", both('"deep(1)", "norms"'), (1e-4, 3e-4), start="own"),
)

EVERY_LAYER = Row(
    "heads, closed form of all layers",
    ('image.extra_layers="all"', 'text.extra_layers="all"', "head.standardize=true", "head.init=cca", "train.epochs=0"),
    (1e-4,),
    start="run",
)
TOWER_RATES, PART_RATES = (1e-5, 3e-5, 1e-4, 3e-4), (3e-4, 1e-3, 3e-3, 1e-2)
LOW_RANK_NORMS = Row("LoRA r=8 + norms", both('"lora(rank=8, alpha=8)", "norms"'), PART_RATES, start="pairs")
METHODS_8000 = (
    replace(FULL, rates=TOWER_RATES, start="pairs"),
    replace(LAYERWISE, rates=PART_RATES, start="pairs"),
    LOW_RANK_NORMS,
    replace(LOCKED, rates=TOWER_RATES, start="pairs"),
    replace(HEADS, rates=(1e-4, 3e-4, 1e-3, 3e-3), start="pairs"),
    replace(CLOSED, changes=("train.epochs=0",), rates=(1e-4,), start="pairs"),
    EVERY_LAYER,
    replace(LOW_RANK, rates=PART_RATES, start="pairs"),
    replace(NORMS, rates=(1e-3, 3e-3, 1e-2, 3e-2), start="pairs"),
    replace(BIASES, rates=PART_RATES, start="pairs"),
    Row("LoRA r=32", both('"lora(rank=32, alpha=32)"'), PART_RATES, start="pairs"),
)
WITHOUT_STEPS = frozenset({CLOSED.name, EVERY_LAYER.name})
UNTUNED = WITHOUT_STEPS | {HEADS.name}


def half(row: Row) -> Row:
    """The same row on towers with half the blocks, at the learning rate selected for the whole ones."""
    halved = ("image.layer=6", "text.layer=3")
    return replace(row, name=f"{row.name}, half the blocks", changes=(*row.changes, *halved), rates=row.rates[:1])


NAMES_HEADS = Row("heads", (), (3e-5, 1e-4))
NAMES_FULL = Row("all blocks, word embeddings frozen", ("tune.text=[\"full(blocks='0:')\"]",), (3e-5, 1e-4))
NAMES_LAYERWISE = Row("adapters + norms (LwA)", ('tune.text=["adapters(reduction=4)", "norms"]',), (1e-3, 3e-3))
LANGUAGES = (
    NAMES_FULL,
    NAMES_HEADS,
    NAMES_LAYERWISE,
    Row("norms (LN)", ('tune.text=["norms"]',), (1e-3, 3e-3)),
    Row("heads, closed form of all pairs", (), (1e-6,), start="all"),
    Row("LoRA r=8", ('tune.text=["lora(rank=8, alpha=8)"]',), (1e-3, 3e-3)),
)
