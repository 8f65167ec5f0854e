"""The rows of the study, and its cells: a row with one seed at one learning rate, for a number of steps.

Input: none, or the records so far. Output: cells in the order to run them. Note: every row trains on the same pairs for
the same steps; a row whose forward FLOPs differ from MS-CLIP's is also run for the number of steps with MS-CLIP's
training FLOPs. One learning rate is used for all rows from scratch: the best on validation data for nothing shared and
MS-CLIP together.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from studies.records import Record, as_recorded

from clasp.config.recipe import Recipe, read_recipe

COMMON = Path(__file__).with_name("scratch.toml")
WRITTEN = 1  # part of every key: increment when the evaluation of a cell changes
SEEDS = (0, 1, 2)
STEPS = 320
TIMED_STEPS = 30
ALIKE = 0.02  # relative FLOP differences below this count as equal

Find = Callable[["Cell"], Record | None]


@dataclass(frozen=True)
class Row:
    """A line of the table: overrides of the common recipe, ``scratch.toml``."""

    name: str
    changes: tuple[str, ...] = ()


APART = ("share.attention=separate", "share.ffn=separate")
STEM = ("image.net.stem=batch", "share.layers=1:")
BRANCH = ("image.net.branch.kind=paper", "image.net.branch.before=[1,2,3]")
ALL = tuple(f"share.{part}=shared" for part in ("norm1", "norm2", "final_norm", "head"))

NOTHING = Row("nothing shared (CLIP)", APART)
MSCLIP = Row("attention and feed-forward (MS-CLIP)")
SCRATCH = (
    NOTHING,
    Row("nothing shared, text two thirds as wide", (*APART, "text.net.width=84")),
    MSCLIP,
    Row("all, with norms and head (SharedCLIP)", ALL),
    Row("feed-forward only", ("share.attention=separate",)),
    Row("attention only (as VLMo)", ("share.ffn=separate",)),
    Row("last half", ("share.layers=-2:",)),
    Row("middle, ends apart (as Uni-X)", ("share.layers=1:3",)),
    Row("MS-CLIP, difference of rank 8 each", ("share.attention={low-rank=8}", "share.ffn={low-rank=8}")),
    Row("MS-CLIP, early specialisation", STEM),
    Row("MS-CLIP, parallel branch", BRANCH),
    Row("MS-CLIP-S (both)", (*STEM, *BRANCH)),
    Row(
        "nothing shared, as many parameters as MS-CLIP",
        (*APART, *(f"{side}.net.width=96" for side in ("image", "text"))),
    ),
    Row(
        "MS-CLIP, as many parameters as CLIP",
        tuple(f"{side}.net.width=176" for side in ("image", "text")),
    ),
)
RATES = (5e-4, 1e-3, 2e-3)
TRIED = (NOTHING, MSCLIP)
"""Rows whose validation metric selects the learning rate"""


@dataclass(frozen=True)
class Cell:
    """A row with one seed, trained for ``steps`` at a learning ``rate`` and evaluated; or a few steps for timing."""

    row: Row
    rate: float
    steps: int
    seed: int
    purpose: Literal["ask", "speed"] = "ask"

    @property
    def recipe(self) -> Recipe:
        """The recipe of its run."""
        changes = (*self.row.changes, f"train.lr={self.rate!r}", f"train.seed={self.seed}")
        return read_recipe(str(COMMON), changes)

    @property
    def key(self) -> str:
        """Key over everything that determines its numbers except software versions."""
        recipe = [as_recorded(tomllib.loads(COMMON.read_text(encoding="utf-8"))), self.row.changes]
        facts = [WRITTEN, recipe, self.rate, self.steps, self.seed, self.purpose]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.purpose} {self.row.name}: rate {self.rate:g}, {self.steps} steps, seed {self.seed}"


def to_time(rows: Sequence[Row]) -> list[Cell]:
    """A few steps of every row; speed does not depend on the rate."""
    return [Cell(row, RATES[0], TIMED_STEPS, 0, "speed") for row in rows]


def to_choose() -> list[Cell]:
    """Cells whose validation metric selects the learning rate, with seed 0."""
    return [Cell(row, rate, STEPS, 0) for rate in RATES for row in TRIED]


def chosen(find: Find) -> float | None:
    """The learning rate; ``None`` before it is selected."""
    cells = to_choose()
    known = [find(cell) for cell in cells]
    if None in known:
        return None
    sums = {rate: 0.0 for rate in RATES}
    for cell, record in zip(cells, known, strict=True):
        assert record is not None
        sums[cell.rate] += record["validation"]
    return max(sums, key=sums.__getitem__)


def cells(rows: Sequence[Row], find: Find, *, seeds: Sequence[int] = SEEDS) -> Iterator[Cell]:
    """Learning rate selection, then every row with seed 0, then the other seeds; as far as determined."""
    yield from to_choose()
    rate = chosen(find)
    if rate is None:
        return
    for seed in seeds:
        for row in rows:
            yield Cell(row, rate, STEPS, seed)
    for seed in seeds:
        for row in rows:
            if other := at_equal_arithmetic(Cell(row, rate, STEPS, seed), rate, find):
                yield other


def at_equal_arithmetic(cell: Cell, rate: float, find: Find) -> Cell | None:
    """The cell for the steps with MS-CLIP's FLOPs; ``None`` where these are equal, or not known yet."""
    own, theirs = find(replace(cell, seed=0)), find(Cell(MSCLIP, rate, STEPS, 0))
    if own is None or theirs is None or abs(own["macs"] / theirs["macs"] - 1) < ALIKE:
        return None
    return replace(cell, steps=round(cell.steps * theirs["macs"] / own["macs"]))
