"""The toy world of the cases: towers, pairs, pictures, a trained run, and copies of them in a temporary folder.

Input: a folder. Output: ``World``. Note: everything is made in forked processes; see ``faults.child``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clasp.commands.search import index_images
from clasp.config.recipe import Recipe
from faults.child import preload_imports
from toydata import toys, write_csv, write_images
from toyruns import delta, lines, recipe, run, save_towers

ADAPTED = ('tune.image=["lora(rank=2)"]', 'tune.text=["norms"]', "train.micro_batch=8")
"""Towers that are trained, so that no features are cached"""
_EVERY_STEP = "train.save_every_minutes=1e-4"


@dataclass(frozen=True)
class World:
    """A folder with towers, 96 pairs and drawings."""

    folder: Path
    seed: int

    @classmethod
    def make(cls, folder: Path, seed: int) -> World:
        world = cls(folder, seed)
        preload_imports(world._write)
        return world

    def _write(self) -> None:
        """The files, a finished run of locked towers with its cache in ``cache``, and an index, which is deleted."""
        save_towers(self.folder / "towers")
        write_csv(toys(96), self.folder / "pairs")
        self.cached_in("cache")
        run(self.recipe(), self.finished)
        copy_tree(self.finished, self.folder / "indexed")
        index_images(self.folder / "indexed", str(self.folder / "pairs" / "images"))
        shutil.rmtree(self.folder / "indexed")

    @property
    def towers(self) -> Path:
        return self.folder / "towers"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs" / "pairs.csv"

    def chance(self, case: str) -> random.Random:
        """The random numbers of a case."""
        return random.Random(f"{self.seed} {case}")

    def recipe(self, *overrides: str) -> Recipe:
        """Locked towers, whose features are cached, unless ``ADAPTED`` says otherwise; its state is saved each step."""
        return recipe(self.towers, self.pairs, _EVERY_STEP, "train.epochs=6", "train.evaluate_every=2", *overrides)

    def cached_in(self, name: str) -> None:
        """Use a cache folder of this name from here on, in this process."""
        os.environ["CLASP_CACHE"] = str(self.folder / name)

    @property
    def finished(self) -> Path:
        """A finished run of locked towers; its features are in ``cache``."""
        return self.folder / "finished"

    def pictures(self, name: str, count: int, seed: int = 1) -> Path:
        """A folder of drawings."""
        return write_images(toys(count, seed=seed), self.folder / name)


def copy_tree(source: Path, target: Path) -> None:
    """A copy in which holes stay holes, with the times of the files."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True)


def run_answer(folder: Path) -> dict[str, Any]:
    """What a run must end with, however often it was interrupted: weights, results (without times) and recipe."""
    results = [{**row, "seconds": 0, "checksum": 0} for row in lines(folder / "results.jsonl")]
    tensors = {name: tensor.numpy().tobytes() for name, tensor in delta(folder).items()}
    return {"delta": tensors, "results": json.dumps(results), "recipe": (folder / "recipe.toml").read_text("utf-8")}
