"""The claims: their sizes, and the order in which their cells are run.

Input: the size of the study, and the records so far. Output: the cells of a claim. Note: cells are ordered, and some
depend on others: those that select a row's learning rate come before those that use it. A cell may belong to several
claims; it is run once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from studies.lilt.cells import Cell, Row
from studies.lilt.rows import FULL, HEADS, LANGUAGES, LAYERWISE, LOW_RANK_NORMS, METHODS, METHODS_8000, TOP, half
from studies.records import Record

SEEDS = 3

Find = Callable[[Cell], Record | None]


# --- sizes -----------------------------------------------------------------------------------------------------------


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
    methods: tuple[Row, ...]
    """Rows of claims 1 and 2"""
    batch: int
    """Pairs a step"""
    cheap: Row
    """Claim 5 and the curve: the row with few parameters beside adapters and norms"""
    epochs: int
    """Epochs of the common recipe"""
    curve: tuple[int, ...]
    """Epochs of the curve; those of the common recipe are among them"""

    def pairs(self, world: str) -> int:
        """Number of training pairs of a cell in this world."""
        return self.photos if world == "photos" else self.names

    def row(self, row: Row) -> Row:
        """The row of this size with the same name: the same tuning, with other learning rates and heads."""
        return next(method for method in self.methods if method.name == row.name)

    @property
    def most(self) -> int:
        """The most photo pairs that a cell trains on."""
        return max(self.photos, *self.ladder)

    @property
    def lasting(self) -> tuple[Row, Row, Row]:
        """Rows of the curve over epochs."""
        return self.row(FULL), self.row(LAYERWISE), self.row(self.cheap)

    @property
    def budgeted(self) -> tuple[tuple[Row, Row], ...]:
        """Rows of claim 5, each with the row whose learning rate it uses."""
        full, layerwise = self.row(FULL), self.row(LAYERWISE)
        smaller = ((half(full), full), (half(layerwise), layerwise))
        return smaller[0], (layerwise, layerwise), (self.cheap, self.cheap), (full, full), smaller[1]


SMALL = Size(
    "small",
    photos=1280,
    names=1280,
    ladder=(320, 640, 1280, 2560),
    budget=640,
    methods=METHODS,
    batch=64,
    cheap=TOP,
    epochs=1,
    curve=(1, 2, 4),
)
LARGER = Size(
    "8000",
    photos=8000,
    names=2176,
    ladder=(1000, 2000, 4000, 8000),
    budget=4000,
    methods=METHODS_8000,
    batch=128,
    cheap=LOW_RANK_NORMS,
    epochs=3,
    curve=(1, 3, 6, 12),
)


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
    yield from compared(size.methods, "photos", size, find)


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
        for row in map(size.row, (FULL, LAYERWISE, HEADS)):
            for pairs in size.ladder:
                yield from at_rates_of(row, row, size, find, pairs, seed)
        for row in map(size.row, (FULL, LAYERWISE)):
            yield from at_rates_of(half(row), row, size, find, size.photos, seed)


def of_languages(size: Size, find: Find) -> Iterator[Cell]:
    """As ``of_methods``, of the text tower."""
    yield from compared(LANGUAGES, "names", size, find)


def of_budgets(size: Size, find: Find) -> Iterator[Cell]:
    """Each row on the number of pairs with the FLOPs of full training of the whole towers on ``budget`` pairs,
    where there are as many; then the numbers of pairs of claim 3, to find how many are needed for equal quality."""
    yield from (counting(row) for row, _ in size.budgeted)
    for seed in range(SEEDS):
        for row, rates in size.budgeted:
            pairs = affordable(find(counting(size.row(FULL))), find(counting(row)), size)
            if pairs and pairs <= size.most:
                yield from at_rates_of(row, rates, size, find, pairs, seed)
    for seed in range(SEEDS):
        for row in map(size.row, (FULL, LAYERWISE)):
            for pairs in size.ladder:
                yield from at_rates_of(row, row, size, find, pairs, seed)


def over(row: Row, epochs: int, size: Size) -> Row:
    """The same row over so many epochs, at the learning rate selected for those of the common recipe."""
    if epochs == size.epochs:
        return row
    changes = (*row.changes, f"train.epochs={epochs}")
    return replace(row, name=f"{row.name}, epochs: {epochs}", changes=changes, rates=row.rates[:1])


def of_epochs(size: Size, find: Find) -> Iterator[Cell]:
    """Full, layerwise and the cheap row over fewer and more epochs."""
    for seed in range(SEEDS):
        for epochs in size.curve:
            for row in size.lasting:
                yield from at_rates_of(over(row, epochs, size), row, size, find, size.photos, seed)


def counting(row: Row) -> Cell:
    """The cell that counts the FLOPs and memory of a row."""
    return Cell("photos", row, row.rates[0], 64, 0, "count")


def affordable(full: Record | None, own: Record | None, size: Size) -> int | None:
    """Number of pairs within the budget of claim 5, in whole batches; ``None`` before FLOPs are counted for full
    training of the whole towers and for the row itself."""
    if full is None or own is None:
        return None
    return size.batch * max(1, round(size.budget * full["flops"] / own["flops"] / size.batch))


def to_time(claim: Claim, size: Size) -> list[Cell]:
    """The cells of a claim to be timed on an idle machine, six steps each; speed does not depend on the rate."""
    budgeted = tuple(row for row, _ in size.budgeted)
    rows = {"claim1": size.methods, "claim4": LANGUAGES, "claim5": budgeted}.get(claim.name, ())
    pairs = 6 * size.batch
    steps = (row for row in rows if "train.epochs=0" not in row.changes)
    return [Cell(claim.world, row, row.rates[0], pairs, 0, "speed") for row in steps]


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
        Claim("epochs", "photos", of_epochs),
    )
}
