"""Cells: one row of a study's table with one seed, trained and asked, and written down as one line of JSON.

In: a ``Cell`` and its world (which pairs train, where heads start, what is asked). Out: a ``Record``, appended to the
results of its claim. Unusual: a cell is known by a key over everything that decides it, so whatever is there is never
run again, by whichever claim it was needed first; and a cell whose definition has changed is another cell.
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

WRITTEN = 2  # part of every key: raise it when the same cell would be asked other things


@runtime_checkable
class World(Protocol):
    """What cells are about: pairs, starts, answers."""

    @property
    def file(self) -> Path:
        """The recipe that all rows have in common, as it is written"""
        ...

    @property
    def recipe(self) -> Recipe:
        """and as it is read."""
        ...

    def pairs(self, count: int, seed: int) -> tuple[Pairs, Pairs]:
        """To train on, and a few that the run is asked about at its end."""
        ...

    def start(self, parts: ModelAndPreprocessing, inputs: FeatureSource, more: Pairs | None) -> Start:
        """Heads for the towers in ``parts``, from pairs that do not train, and ``more`` where given."""
        ...

    def validate(self, model: DualEncoder, inputs: FeatureSource) -> float:
        """What learning rates are chosen by; more is better."""
        ...

    def ask(self, model: DualEncoder, inputs: FeatureSource) -> dict[str, Answer]:
        """What tables and figures are made from."""
        ...


@dataclass(frozen=True)
class Row:
    """A row of a table: what is changed in the common recipe, and the learning rates to choose from.

    ``changes``: overrides of the recipe. ``rates``: of what trains in the towers or, in a row where nothing does, of
    the heads. ``start``: heads start from what the ``base`` towers say; from what its own do (``own``), where they say
    something else than their bases; or from its training pairs as well (``all``).
    """

    name: str
    changes: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    start: Literal["base", "own", "all"] = "base"

    def recipe(self, common: Recipe, rate: float, seed: int) -> Recipe:
        """Its recipe at one of its learning rates."""
        made = common.with_overrides((*self.changes, f"train.seed={seed}"))
        if made.tune.image == made.tune.text == ["none"]:
            return made.with_overrides([f"train.lr={rate!r}"])
        kept = made.train.lr / rate  # heads and scale stay at the common rate
        factors = [f"train.lr_factors.{kind}={kept!r}" for kind in ("head", "scale")]
        return made.with_overrides([f"train.lr={rate!r}", *factors])


@dataclass(frozen=True)
class Cell:
    """A row, its learning rate, how many pairs it sees, and a seed.

    ``purpose``: to be asked (``ask``; with seed 0 also on validation data, which chooses the learning rate), to count
    arithmetic and memory of a step (``count``), or to be timed, alone in a process on an idle machine (``speed``).
    """

    world: str
    row: Row
    rate: float
    pairs: int
    seed: int
    purpose: Literal["ask", "count", "speed"]

    def key(self, common: Path) -> str:
        """Of everything that decides its numbers, but for versions of software; ``common`` is the recipe's file."""
        recipe = as_recorded(tomllib.loads(common.read_text(encoding="utf-8")))
        row = [recipe, self.row.changes, self.row.start, self.rate]
        facts = [WRITTEN, self.world, row, self.pairs, self.seed, self.purpose]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.purpose} {self.row.name}: rate {self.rate:g}, {self.pairs} pairs, seed {self.seed}"


class Runner:
    """Runs the cells of one world; keeps the untouched towers, and where heads start from them, in memory."""

    def __init__(self, name: str, world: World, results: Results, folder: Path | None = None):
        self.name, self.world, self.results = name, world, results
        self._folder = folder
        self._bases: dict[str, tuple[ModelAndPreprocessing, FeatureSource]] = {}
        self._starts: dict[str, Start] = {}

    def record(self, cell: Cell) -> Record | None:
        """What is known of a cell."""
        return self.results.get(cell.key(self.world.file))

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those not run yet, in their order, each once."""
        left = {cell.key(self.world.file): cell for cell in cells}
        return [cell for key, cell in left.items() if self.results.get(key) is None]

    def run(self, claim: str, cell: Cell) -> Record:
        """Do what the cell is for, and write it down."""
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
                raise KeyboardInterrupt  # clasp saves a run that is told to stop; a cell starts anew
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
        """Of the untouched towers once for all rows; where they say something else than these, of the row's own."""
        if cell.row.start == "own":
            return self.world.start(
                parts, build_feature_source(parts, recipe.with_overrides(["data.feature_cache=off"])), None
            )
        towers = json.dumps([recipe.to_dict()["image"], recipe.to_dict()["text"]], sort_keys=True)
        if towers not in self._bases:
            untouched = recipe.with_overrides(['tune.image=["none"]', 'tune.text=["none"]', "train.seed=0"])
            base = build_model_and_preprocessing(untouched)
            self._bases = {towers: (base, build_feature_source(base, untouched))}  # one at a time: towers are large
        if cell.row.start == "all":
            return self.world.start(*self._bases[towers], self.world.pairs(cell.pairs, cell.seed)[0])
        if towers not in self._starts:
            self._starts[towers] = self.world.start(*self._bases[towers], None)
        return self._starts[towers]


def _nobody(line: str) -> None:
    """Nobody listens."""
