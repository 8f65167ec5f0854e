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
    """Claim 5: the row with few parameters beside adapters and norms"""

    def pairs(self, world: str) -> int:
        """Number of training pairs of a cell in this world."""
        return self.photos if world == "photos" else self.names

    def row(self, row: Row) -> Row:
        """The row of this size with the same name: the same tuning, with other learning rates and heads."""
        return next(method for method in self.methods if method.name == row.name)

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


def of_budgets(size: Size, find: Find) -> Iterator[Cell]:
    """Each row on the number of pairs with the FLOPs of full training of the whole towers on ``budget`` pairs; then the
    numbers of pairs of claim 3, to find how many are needed for equal quality."""
    yield from (counting(row) for row, _ in size.budgeted)
    for seed in range(SEEDS):
        for row, rates in size.budgeted:
            if pairs := affordable(find(counting(size.row(FULL))), find(counting(row)), size):
                yield from at_rates_of(row, rates, size, find, pairs, seed)
    for seed in range(SEEDS):
        for row in map(size.row, (FULL, LAYERWISE)):
            for pairs in size.ladder:
                yield from at_rates_of(row, row, size, find, pairs, seed)


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
    )
}
