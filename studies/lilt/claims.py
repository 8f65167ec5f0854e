"""The claims: their rows, learning rates, numbers of pairs, and the order in which their cells are run.

Input: the size of the study, and the records so far. Output: the cells of a claim. Note: cells are ordered, and some
depend on others: those that select a row's learning rate come before those that use it. A cell may belong to several
claims; it is run once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from studies.lilt.cells import Cell, Row
from studies.records import Record

SEEDS = 3

Find = Callable[[Cell], Record | None]


@dataclass(frozen=True)
class Size:
    """The size of a study."""

    name: str
    photos: int
    """Default number of photo pairs to train on"""
    names: int
    """Number of drawing-name pairs to train on"""
    ladder: tuple[int, ...]
    """Claim 3: fewer and more pairs"""
    budget: int
    """Claim 5: budget, as the number of pairs of full training of the whole towers"""

    def pairs(self, world: str) -> int:
        """Number of training pairs of a cell in this world."""
        return self.photos if world == "photos" else self.names


SMALL = Size("small", photos=1280, names=1280, ladder=(320, 640, 1280, 2560), budget=640)
LARGER = Size("larger", photos=3840, names=2176, ladder=(480, 960, 1920, 3840), budget=1920)


# --- rows ------------------------------------------------------------------------------------------------------------


def both(methods: str) -> tuple[str, ...]:
    """A row with the same tuning of both towers; ``methods`` as in a recipe's list."""
    return (f"tune.image=[{methods}]", f"tune.text=[{methods}]")


HEADS = Row("heads", (), (3e-5, 1e-4))
CLOSED = Row("heads, closed form of all pairs", (), (1e-6,), start="all")
FULL = Row("full (CLIP)", both('"full"'), (3e-5, 1e-4))
LAYERWISE = Row("adapters + norms (LwA)", both('"adapters(reduction=4)", "norms"'), (1e-3, 3e-3))
NORMS = Row("norms (LN)", both('"norms"'), (1e-3, 3e-3))
LOCKED = Row("image locked, text full (LiT)", ('tune.text=["full"]',), (3e-5, 1e-4))
LOW_RANK = Row("LoRA r=8", both('"lora(rank=8, alpha=8)"'), (1e-3, 3e-3))
TOP = Row("LoRA r=8, top 4 blocks", both("\"lora(rank=8, alpha=8, blocks='-4:')\""), (1e-3, 3e-3))
METHODS = (
    FULL,
    HEADS,
    CLOSED,
    LAYERWISE,
    NORMS,
    LOCKED,
    Row("biases (BitFit)", both('"biases"'), (1e-3, 3e-3)),
    LOW_RANK,
    TOP,
    Row("last block", both('"last(1)"'), (1e-4, 3e-4)),
    Row("one block more + norms (DA)", both('"deep(1)", "norms"'), (1e-4, 3e-4), start="own"),
)


def half(row: Row) -> Row:
    """The same row on towers with half the blocks, at the learning rate selected for the whole ones."""
    halved = ("image.layer=6", "text.layer=3")
    return replace(row, name=f"{row.name}, half the blocks", changes=(*row.changes, *halved), rates=row.rates[:1])


# --- cells -----------------------------------------------------------------------------------------------------------


LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TRIES = 4


def to_choose(row: Row, world: str, size: Size, find: Find) -> tuple[list[Cell], float | None]:
    """The cells that select a row's learning rate, with seed 0, as far as known; and the rate, once it is selected.

    The row's candidate rates come first; while the best is the lowest or the highest tried, the next beyond it. The
    test results of these cells are not used for selection; those of the selected one are the row's results with seed 0.
    """
    cells = [Cell(world, row, rate, size.pairs(world), 0, "ask") for rate in row.rates]
    if len(cells) == 1:
        return cells, row.rates[0]
    while True:
        known = {cell.rate: record["validation"] for cell in cells if (record := find(cell)) is not None}
        if len(known) < len(cells):
            return cells, None
        best = max(known, key=known.__getitem__)
        beyond = _beyond(best, known)
        if beyond is None or len(cells) >= TRIES:
            return cells, best
        cells.append(replace(cells[0], rate=beyond))


def _beyond(best: float, known: Collection[float]) -> float | None:
    """The next candidate beyond the best rate, if that is the lowest or the highest tried."""
    at = min(range(len(LADDER)), key=lambda rung: abs(LADDER[rung] / best - 1))
    step = -1 if best == min(known) else 1 if best == max(known) else 0
    return LADDER[at + step] if step and 0 <= at + step < len(LADDER) else None


def chosen(row: Row, world: str, size: Size, find: Find) -> float | None:
    """A row's learning rate; ``None`` before it is selected."""
    return to_choose(row, world, size, find)[1]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper. ``cells`` returns all that are determined so far, in the order to run them."""

    name: str
    world: str
    cells: Callable[[Size, Find], Iterator[Cell]]


def of_methods(size: Size, find: Find) -> Iterator[Cell]:
    """Learning rate selection and seed 0 of every row, then seed 1, then seed 2."""
    yield from compared(METHODS, "photos", size, find)


def compared(rows: Sequence[Row], world: str, size: Size, find: Find) -> Iterator[Cell]:
    """As above, for any rows of a world."""
    for seed in range(SEEDS):
        for row in rows:
            to_try, rate = to_choose(row, world, size, find)
            if seed == 0:
                yield from to_try
            if rate is not None:
                yield Cell(world, row, rate, size.pairs(world), seed, "ask")


def of_scales(size: Size, find: Find) -> Iterator[Cell]:
    """Full, layerwise and heads on fewer and on more pairs; then full and layerwise on towers with half the blocks."""
    for seed in range(SEEDS):
        for row in (FULL, LAYERWISE, HEADS):
            for pairs in size.ladder:
                yield from at_rates_of(row, row, size, find, pairs, seed)
        for row in (FULL, LAYERWISE):
            yield from at_rates_of(half(row), row, size, find, size.photos, seed)


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


def of_languages(size: Size, find: Find) -> Iterator[Cell]:
    """As ``of_methods``, of the text tower."""
    yield from compared(LANGUAGES, "names", size, find)


BUDGETED = ((half(FULL), FULL), (LAYERWISE, LAYERWISE), (TOP, TOP), (FULL, FULL), (half(LAYERWISE), LAYERWISE))
"""Rows of claim 5, each with the row whose learning rate it uses."""


def of_budgets(size: Size, find: Find) -> Iterator[Cell]:
    """Each row on the number of pairs with the FLOPs of full training of the whole towers on ``budget`` pairs; then the
    numbers of pairs of claim 3, to find how many are needed for equal quality."""
    yield from (counting(row) for row, _ in BUDGETED)
    for seed in range(SEEDS):
        for row, rates in BUDGETED:
            if pairs := affordable(find(counting(FULL)), find(counting(row)), size):
                yield from at_rates_of(row, rates, size, find, pairs, seed)
    for seed in range(SEEDS):
        for row in (FULL, LAYERWISE):
            for pairs in size.ladder:
                yield from at_rates_of(row, row, size, find, pairs, seed)


def counting(row: Row) -> Cell:
    """The cell that counts the FLOPs and memory of a row."""
    return Cell("photos", row, row.rates[0], 64, 0, "count")


def affordable(full: Record | None, own: Record | None, size: Size) -> int | None:
    """Number of pairs within the budget of claim 5, in whole batches of 64; ``None`` before FLOPs are counted for full
    training of the whole towers and for the row itself."""
    if full is None or own is None:
        return None
    return 64 * max(1, round(size.budget * full["flops"] / own["flops"] / 64))


def to_time(claim: Claim) -> list[Cell]:
    """The cells of a claim to be timed on an idle machine, six steps each; speed does not depend on the rate."""
    rows = {"claim1": METHODS, "claim4": LANGUAGES, "claim5": tuple(row for row, _ in BUDGETED)}.get(claim.name, ())
    return [Cell(claim.world, row, row.rates[0], 6 * 64, 0, "speed") for row in rows]


def at_rates_of(row: Row, rates: Row, size: Size, find: Find, pairs: int, seed: int) -> Iterator[Cell]:
    """A cell at the learning rate selected by another row; before that, the cells that select it."""
    to_try, rate = to_choose(rates, "photos", size, find)
    if rate is None:
        yield from to_try
    else:
        yield Cell("photos", row, rate, pairs, seed, "ask")


CLAIMS = {
    claim.name: claim
    for claim in (
        Claim("claim1", "photos", of_methods),
        Claim("claim2", "photos", of_methods),
        Claim("claim3", "photos", of_scales),
        Claim("claim4", "names", of_languages),
        Claim("claim5", "photos", of_budgets),
    )
}
