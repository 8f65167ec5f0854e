"""The rows of the study of a pre-trained trunk, and its cells: a row at a learning rate, for a number of steps.

Input: the records so far. Output: cells in the order to run them, and those that the page shows. Note: the learning
rate of a row is the one with the highest log-likelihood on held-out photos after ``CHOSEN_AT`` steps; longer runs of
the row have the same. The rate is that of what trains in the towers; heads and logit scale have the common one.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from studies.lilt.cells import Row
from studies.records import Record, as_recorded

from clasp.config.recipe import Recipe, read_recipe

COMMON = Path(__file__).with_name("trunk.toml")
WRITTEN = 1  # part of every key: increment when the evaluation of a cell changes
PAIRS = 8000
SIZES = {"held": 1000, "test": 2400, "objects": 1000, "objects_to_fit": 500, "scenes": 0}
"""Photos that are asked, by ``studies.lilt.photos.Sizes``"""
STEPS = (0, 60, 180, 540)
CHOSEN_AT = 60
START_RATE = 1e-3  # of a run of no steps, where no rate counts
SEEDS = (0,)

TWO = Row("two towers", (), (1e-3, 3e-3))
ROWS = (
    TWO,
    Row("DINOv2's blocks for captions too", ("share.trunk=image",), (1e-4, 3e-4, 1e-3)),
    Row("MiniLM's blocks for photos too", ("share.trunk=text",), (3e-4, 1e-3, 3e-3)),
)

Find = Callable[[str], Record | None]
"""The record of a key"""


@dataclass(frozen=True)
class Cell:
    """A row trained at a learning ``rate`` for ``steps``, and asked validation photos."""

    row: Row
    rate: float
    steps: int
    seed: int = 0

    @property
    def recipe(self) -> Recipe:
        """The recipe of its run."""
        made = self.row.recipe(read_recipe(COMMON), self.rate, self.seed)
        batch = int(made.train.batch_size)
        epochs = [f"train.epochs={-(-self.steps // (PAIRS // batch))}"]
        return made.with_overrides(epochs + ([f"train.max_steps={self.steps}"] if self.steps else []))

    @property
    def key(self) -> str:
        """Key over everything that determines its numbers except software versions."""
        common = as_recorded(tomllib.loads(COMMON.read_text(encoding="utf-8")))
        facts = [WRITTEN, PAIRS, SIZES, common, self.row.changes, self.rate, self.steps, self.seed]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def test_key(self) -> str:
        """The key of its answers on test photos."""
        return f"test-{self.key}"

    def __str__(self) -> str:
        return f"{self.row.name}: rate {self.rate:g}, {self.steps} steps, seed {self.seed}"


def start_of(row: Row) -> Cell:
    """A row before its first step; no learning rate counts."""
    return Cell(row, START_RATE, 0)


def to_choose(row: Row) -> list[Cell]:
    """The cells whose validation metric selects the learning rate of a row."""
    return [Cell(row, rate, CHOSEN_AT) for rate in row.rates]


def chosen(row: Row, find: Find) -> float | None:
    """The learning rate of a row; ``None`` before it is selected."""
    found = {cell.rate: find(cell.key) for cell in to_choose(row)}
    known = {rate: record["validation"] for rate, record in found.items() if record is not None}
    return max(known, key=known.__getitem__) if len(known) == len(found) else None


def cells(find: Find) -> list[Cell]:
    """All cells that can be run or are: rows before their first step, which the others start from; then rates; then
    every row for more and more steps."""
    rates = [cell for row in ROWS for cell in to_choose(row)]
    trained = [*rates, *(cell for cell in shown(find) if cell.steps > CHOSEN_AT)]
    started = [cell for cell in trained if find(start_of(cell.row).key) is not None]
    return [*map(start_of, ROWS), *started]


def shown(find: Find) -> list[Cell]:
    """The cells of the page: every row for every number of steps, at its learning rate."""
    return [cell for steps in STEPS for row in ROWS for cell in at(row, steps, find)]


def at(row: Row, steps: int, find: Find) -> Iterator[Cell]:
    """The cells of a row for a number of steps, one a seed; none before its learning rate is selected."""
    if steps == 0:
        yield start_of(row)
    elif (rate := chosen(row, find)) is not None:
        yield from (Cell(row, rate, steps, seed) for seed in SEEDS)
