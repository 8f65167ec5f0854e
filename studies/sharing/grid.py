"""The rows of the study, and its cells: a row with one seed at one learning rate, for so many steps.

In: nothing, or what is known so far. Out: cells in the order to run them. Unusual: every row trains on the same pairs
for the same steps; a row whose forward pass takes other arithmetic than MS-CLIP's is also run for as many steps as
take MS-CLIP's arithmetic. One learning rate serves all rows from scratch: the one under which nothing shared and
MS-CLIP do best together on validation data.
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

HERE = Path(__file__).parent
WRITTEN = 1  # part of every key: raise it when the same cell would be asked other things
SEEDS = (0, 1, 2)
STEPS = 320
TRUNK_STEPS = 40
TIMED_STEPS = 30
ALIKE = 0.02  # arithmetic that differs by less is the same

Find = Callable[["Cell"], Record | None]


@dataclass(frozen=True)
class Row:
    """A line of the table: what is changed in the recipe of its group (``scratch.toml`` or ``trunk.toml``)."""

    name: str
    changes: tuple[str, ...] = ()
    group: str = "scratch"

    @property
    def file(self) -> Path:
        """The recipe that its group has in common."""
        return HERE / f"{self.group}.toml"

    @property
    def steps(self) -> int:
        """Of its cells, where nothing is said of arithmetic."""
        return STEPS if self.group == "scratch" else TRUNK_STEPS


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
TRUNKS = (
    Row("two towers", (), "trunk"),
    Row("the image tower is the trunk of both", ("share.trunk=image",), "trunk"),
    Row("the text tower is the trunk of both", ("share.trunk=text",), "trunk"),
)
RATES = {"scratch": (5e-4, 1e-3, 2e-3), "trunk": (3e-4, 1e-3, 3e-3)}
TRIED = {"scratch": (NOTHING, MSCLIP), "trunk": TRUNKS[:2]}
"""Rows whose validation chooses the learning rate of their group"""


@dataclass(frozen=True)
class Cell:
    """A row with one seed, trained for ``steps`` at a learning ``rate``, to be asked; or a few steps, to be timed."""

    row: Row
    rate: float
    steps: int
    seed: int
    purpose: Literal["ask", "speed"] = "ask"

    @property
    def recipe(self) -> Recipe:
        """Of its run."""
        changes = (*self.row.changes, f"train.lr={self.rate!r}", f"train.seed={self.seed}")
        return read_recipe(str(self.row.file), changes)

    @property
    def key(self) -> str:
        """Of everything that decides its numbers, but for versions of software."""
        recipe = [as_recorded(tomllib.loads(self.row.file.read_text(encoding="utf-8"))), self.row.changes]
        facts = [WRITTEN, recipe, self.rate, self.steps, self.seed, self.purpose]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.purpose} {self.row.name}: rate {self.rate:g}, {self.steps} steps, seed {self.seed}"


def to_time(rows: Sequence[Row]) -> list[Cell]:
    """A few steps of every row; speed does not depend on the rate."""
    return [Cell(row, RATES[row.group][0], TIMED_STEPS, 0, "speed") for row in rows]


def to_choose(group: str) -> list[Cell]:
    """Cells whose validation chooses the learning rate of a group, with seed 0."""
    return [Cell(row, rate, row.steps, 0) for rate in RATES[group] for row in TRIED[group]]


def chosen(group: str, find: Find) -> float | None:
    """The rate of a group; ``None`` before it can be told."""
    cells = to_choose(group)
    known = [find(cell) for cell in cells]
    if None in known:
        return None
    sums = {rate: 0.0 for rate in RATES[group]}
    for cell, record in zip(cells, known, strict=True):
        assert record is not None
        sums[cell.rate] += record["validation"]
    return max(sums, key=sums.__getitem__)


def cells(rows: Sequence[Row], find: Find, *, seeds: Sequence[int] = SEEDS) -> Iterator[Cell]:
    """Those that choose a learning rate; then every row with seed 0, then with the others; as far as can be told."""
    for group in dict.fromkeys(row.group for row in rows):
        yield from to_choose(group)
        rate = chosen(group, find)
        if rate is None:
            continue
        for seed in seeds:
            for row in (row for row in rows if row.group == group):
                yield Cell(row, rate, row.steps, seed)
        for seed in seeds:
            for row in (row for row in rows if row.group == group):
                if other := at_equal_arithmetic(Cell(row, rate, row.steps, seed), rate, find):
                    yield other


def at_equal_arithmetic(cell: Cell, rate: float, find: Find) -> Cell | None:
    """The same for as many steps as take MS-CLIP's arithmetic; ``None`` where that is as many, or not known yet."""
    if cell.row.group != "scratch":
        return None
    own, theirs = find(replace(cell, seed=0)), find(Cell(MSCLIP, rate, MSCLIP.steps, 0))
    if own is None or theirs is None or abs(own["macs"] / theirs["macs"] - 1) < ALIKE:
        return None
    return replace(cell, steps=round(cell.steps * theirs["macs"] / own["macs"]))
