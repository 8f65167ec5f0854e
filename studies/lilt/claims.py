"""The claims: which rows with which learning rates, how many pairs, and the order in which cells are run.

In: nothing but the size of the study. Out: for each claim its ``Plan``: rows, and cells once learning rates are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from studies.lilt.cells import Cell, Record, Row

SEEDS = 3

LWA = "\"adapters(reduction=4)\", \"norms\""


def both(methods: str) -> tuple[str, ...]:
    """The same tuning of both towers; ``methods`` as they stand in a recipe's list."""
    return (f"tune.image=[{methods}]", f"tune.text=[{methods}]")


HEADS = Row("heads", (), (3e-5, 1e-4, 3e-4))
CLOSED = Row("heads, closed form of all pairs", (), (1e-6,), start="all")
FULL = Row("full (CLIP)", both('"full"'), (3e-5, 1e-4, 3e-4))
LAYERWISE = Row("adapters + norms (LwA)", both(LWA), (3e-4, 1e-3, 3e-3))
METHODS = (
    FULL,
    HEADS,
    CLOSED,
    LAYERWISE,
    Row("norms (LN)", both('"norms"'), (1e-3, 3e-3, 1e-2)),
    Row("image locked, text full (LiT)", ('tune.text=["full"]',), (3e-5, 1e-4, 3e-4)),
    Row("biases (BitFit)", both('"biases"'), (1e-3, 3e-3, 1e-2)),
    Row("LoRA r=8", both('"lora(rank=8, alpha=8)"'), (3e-4, 1e-3, 3e-3)),
    Row("last block", both('"last(1)"'), (1e-4, 3e-4, 1e-3)),
    Row("one block more + norms (DA)", both('"deep(1)", "norms"'), (1e-4, 3e-4, 1e-3), start="own"),
    Row("LoRA r=8, top 4 blocks, kept below", both("\"lora(rank=8, alpha=8, blocks='-4:')\""), (3e-4, 1e-3, 3e-3)),
)


@dataclass(frozen=True)
class Size:
    """How large a study is."""

    name: str
    pairs: int
    """That a quality cell trains on"""
    to_choose: int
    """That a cell trains on which chooses a learning rate"""
    ladder: tuple[int, ...]
    """Of claim 3: fewer and more pairs"""


SMALL = Size("small", pairs=1280, to_choose=640, ladder=(320, 640, 1280, 2560))
LARGER = Size("larger", pairs=3840, to_choose=1920, ladder=(480, 960, 1920, 3840))


def to_choose(rows: Sequence[Row], world: str, size: Size) -> list[Cell]:
    """A cell for each learning rate of each row, with seed 0."""
    return [Cell(world, row, rate, size.to_choose, 0, "validate") for row in rows for rate in row.rates]


Find = Callable[[Cell], Record | None]


def chosen(row: Row, world: str, size: Size, find: Find) -> float | None:
    """The rate with the best validation; ``None`` before all have been tried."""
    found = [(find(cell), cell.rate) for cell in to_choose([row], world, size)]
    if any(record is None for record, _ in found):
        return None
    return max((record["validation"], rate) for record, rate in found if record)[1]


def to_ask(rows: Sequence[Row], world: str, size: Size, find: Find, pairs: int = 0) -> list[Cell]:
    """Seed 0 of every row, then seed 1, then seed 2, of the rows whose learning rate is known."""
    rates = {row.name: chosen(row, world, size, find) for row in rows}
    return [
        Cell(world, row, rate, pairs or size.pairs, seed, "ask")
        for seed in range(SEEDS)
        for row in rows
        if (rate := rates[row.name]) is not None
    ]
