"""Cells: one row of a study's table with one seed, trained, evaluated and recorded as one line of JSON.

Input: a ``Cell`` and its world (training pairs, initial heads, metrics). Output: a ``Record``, appended to the results
of its claim. Note: a cell is identified by a key over everything that determines it, so a recorded cell is never run
again, whichever claim needed it first; and a cell whose definition has changed is a different cell.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from studies.evaluation import Answer
from studies.lilt import costs
from studies.lilt.initial_heads import Start
from studies.records import Record, Results, as_recorded, machine

from clasp.commands.run_context import Preloaded
from clasp.commands.train import train_recipe
from clasp.config.build import ModelAndPreprocessing, build_feature_source, build_model_and_preprocessing
from clasp.config.recipe import Recipe
from clasp.data.pairs import Pairs
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource

WRITTEN = 2  # part of every key: increment when the evaluation of a cell changes


@runtime_checkable
class World(Protocol):
    """The data of cells: training pairs, initial heads, evaluation."""

    @property
    def file(self) -> Path:
        """The common recipe of all rows, as a file"""
        ...

    @property
    def recipe(self) -> Recipe:
        """The common recipe, parsed."""
        ...

    def pairs(self, count: int, seed: int) -> tuple[Pairs, Pairs]:
        """Training pairs, and a few for the validation at the end of the run."""
        ...

    def start(self, parts: ModelAndPreprocessing, inputs: FeatureSource, *pairs: Pairs) -> Start:
        """Closed-form heads for the towers in ``parts``, from these pairs together."""
        ...

    @property
    def outside(self) -> Pairs:
        """Pairs outside the training set, for initial heads."""
        ...

    def validate(self, model: DualEncoder, inputs: FeatureSource) -> float:
        """The validation metric that selects learning rates; higher is better."""
        ...

    def ask(self, model: DualEncoder, inputs: FeatureSource) -> dict[str, Answer]:
        """The answers that tables and figures are made from."""
        ...


@dataclass(frozen=True)
class Row:
    """A row of a table: overrides of the common recipe, and the candidate learning rates.

    ``changes``: overrides of the recipe. ``rates``: learning rates of the trainable parameters in the towers or, in a
    row with frozen towers, of the heads. ``start``: the pairs and towers from which the heads are initialised: pairs
    that never train, and the ``base`` towers or the row's ``own``, where their initial features differ; those and the
    training pairs (``all``); the training ``pairs`` alone; or the ``run`` initialises them itself.
    """

    name: str
    changes: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    start: Literal["base", "own", "all", "pairs", "run"] = "base"

    def recipe(self, common: Recipe, rate: float, seed: int) -> Recipe:
        """The recipe of the row at one of its learning rates."""
        made = common.with_overrides((*self.changes, f"train.seed={seed}"))
        if made.tune.image == made.tune.text == ["none"]:
            return made.with_overrides([f"train.lr={rate!r}"])
        kept = made.train.lr / rate  # heads and logit scale keep the common learning rate
        factors = [f"train.lr_factors.{kind}={kept!r}" for kind in ("head", "scale")]
        return made.with_overrides([f"train.lr={rate!r}", *factors])


@dataclass(frozen=True)
class Cell:
    """A row with its learning rate, number of training pairs and seed.

    ``purpose``: evaluation (``ask``; with seed 0 also on validation data, which selects the learning rate), counting
    FLOPs and memory of a step (``count``), or timing, alone in a process on an idle machine (``speed``).
    """

    world: str
    row: Row
    rate: float
    pairs: int
    seed: int
    purpose: Literal["ask", "count", "speed"]

    def key(self, common: Path) -> str:
        """Key over everything that determines the cell's numbers except software versions; ``common`` is the recipe
        file."""
        recipe = as_recorded(tomllib.loads(common.read_text(encoding="utf-8")))
        row = [recipe, self.row.changes, self.row.start, self.rate]
        facts = [WRITTEN, self.world, row, self.pairs, self.seed, self.purpose]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.purpose} {self.row.name}: rate {self.rate:g}, {self.pairs} pairs, seed {self.seed}"


class Runner:
    """Runs the cells of one world; caches the base towers, and the heads initialised from them, in memory."""

    def __init__(self, name: str, world: World, results: Results, folder: Path | None = None):
        self.name, self.world, self.results = name, world, results
        self._folder = folder
        self._bases: dict[str, tuple[ModelAndPreprocessing, FeatureSource]] = {}
        self._starts: dict[str, Start] = {}

    def record(self, cell: Cell) -> Record | None:
        """The record of a cell, if there is one."""
        return self.results.get(cell.key(self.world.file))

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells without a record, in order, without duplicates."""
        left = {cell.key(self.world.file): cell for cell in cells}
        return [cell for key, cell in left.items() if self.results.get(key) is None]

    def run(self, claim: str, cell: Cell) -> Record:
        """Run the cell for its purpose, and record it."""
        recipe = cell.row.recipe(self.world.recipe, cell.rate, cell.seed)
        parts = build_model_and_preprocessing(recipe)
        record: Record = {
            "key": cell.key(self.world.file),
            **{"row": cell.row.name, "world": cell.world, "rate": cell.rate, "pairs": cell.pairs, "seed": cell.seed},
            "purpose": cell.purpose,
            "recipe": recipe.to_dict(),
            "counts": {part: asdict(count) for part, count in parts.model.parameter_counts().items()},
        }
        if cell.purpose == "count":
            record |= costs.counted(parts, recipe, self.world.pairs(cell.pairs, cell.seed)[0])
        else:
            if cell.row.start != "run":
                self._start(cell, recipe, parts).put(parts.model)
            record |= self._train(cell, recipe, parts)
        record["machine"] = machine()
        self.results.add(claim, record)
        return record

    def _train(self, cell: Cell, recipe: Recipe, parts: ModelAndPreprocessing) -> Record:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            began = time.perf_counter()
            pairs = self.world.pairs(cell.pairs, cell.seed)
            done = train_recipe(recipe, Path(folder) / "run", say=_nobody, preloaded=Preloaded(pairs, parts))
            if done.fitted.interrupted:
                raise KeyboardInterrupt  # clasp saves an interrupted run; a cell always starts from scratch
            trained = time.perf_counter() - began
            log = [json.loads(line) for line in (done.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        record: Record = {
            "delta_bytes": done.delta_bytes,
            "losses": [round(line["loss"], 4) for line in log if line["event"] == "step"],
        }
        began = time.perf_counter()
        inputs = build_feature_source(parts, recipe)
        if cell.purpose == "speed":
            record |= costs.timed(done)
        else:
            record["answers"] = self.world.ask(parts.model, inputs)
        if cell.purpose == "ask" and cell.seed == 0:
            record["validation"] = self.world.validate(parts.model, inputs)
        record["seconds"] = {"train": round(trained, 2), "ask": round(time.perf_counter() - began, 2)}
        return record

    def _start(self, cell: Cell, recipe: Recipe, parts: ModelAndPreprocessing) -> Start:
        """Heads from the base towers, once for all rows; from the row's own towers where their features differ."""
        outside = self.world.outside
        if cell.row.start == "own":
            own = build_feature_source(parts, recipe.with_overrides(["data.feature_cache=off"]))
            return self.world.start(parts, own, outside)
        towers = json.dumps([recipe.to_dict()["image"], recipe.to_dict()["text"]], sort_keys=True)
        if towers not in self._bases:
            untouched = recipe.with_overrides(['tune.image=["none"]', 'tune.text=["none"]', "train.seed=0"])
            base = build_model_and_preprocessing(untouched)
            self._bases = {towers: (base, build_feature_source(base, untouched))}  # one at a time, to save memory
        trained = self.world.pairs(cell.pairs, cell.seed)[0]
        if cell.row.start == "pairs":
            return self.world.start(*self._bases[towers], trained)
        if cell.row.start == "all":
            return self.world.start(*self._bases[towers], outside, trained)
        if towers not in self._starts:
            self._starts[towers] = self.world.start(*self._bases[towers], outside)
        return self._starts[towers]


def _nobody(line: str) -> None:
    """A reporter that ignores all events."""
