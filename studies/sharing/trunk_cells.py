"""Runs the cells of the study of a pre-trained trunk: trained by ``clasp.commands.train``, asked, and recorded.

Input: the photos, a folder for the runs, the folder of the records. Output: records, lines in ``results/trunk.jsonl``.
Note: several processes may run at once, each takes the next cell that no other holds; a cell that was stopped is
resumed, and a finished run is kept, so that test photos can be asked later.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from studies.lilt.cells import Row
from studies.lilt.photos import Photos
from studies.records import Record, Results, machine
from studies.sharing.cells import macs
from studies.sharing.trunk_grid import PAIRS, Cell, cells, shown, start_of

from clasp.commands.run_context import Preloaded
from clasp.commands.train import train_recipe
from clasp.config.build import ModelAndPreprocessing, build_feature_source, build_model_and_preprocessing, load
from clasp.models.dual_encoder import DualEncoder
from clasp.training.run_folder import RunFolder

WAIT = 5  # seconds until a process looks again, where others hold every cell that is known


class Study:
    """Runs cells; their runs are kept in ``folder``, their records in ``results``."""

    def __init__(self, photos: Photos, folder: Path, results: Path):
        self.photos, self.folder, self.results = photos, folder, results

    def go_on(self, minutes: float, *, test: bool) -> None:
        """Run every missing cell; ``test``: ask the test photos of the finished cells of the page instead."""
        self.folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            find = Results(self.results).get  # read again: other processes write too
            wanted = [cell for cell in shown(find) if find(cell.key) is not None] if test else cells(find)
            left = [cell for cell in wanted if find(cell.test_key if test else cell.key) is None]
            if not left:
                return
            if not any(self._took(cell, test=test) for cell in left):
                time.sleep(WAIT)

    def _took(self, cell: Cell, *, test: bool) -> bool:
        """Run and record a cell; ``False`` where another process holds it."""
        key = cell.test_key if test else cell.key
        with _held(self.folder / f"{cell.key}.lock") as mine:
            if mine and Results(self.results).get(key) is None:
                print(time.strftime("%H:%M:%S"), "test" if test else "train", cell, flush=True)
                record = {"key": key, **(self.ask_test(cell) if test else self.run(cell)), "machine": machine()}
                Results(self.results).add("trunk", record)
                print("        ", record["seconds"], record.get("validation", ""), flush=True)
            return mine

    def run(self, cell: Cell) -> Record:
        """Train a cell, and ask validation photos."""
        began = time.perf_counter()
        parts = self._trained(cell)
        trained = time.perf_counter()
        model = parts.model.eval()
        answers, likelihood = self.photos.classify("validation", model, build_feature_source(parts, cell.recipe))
        return {
            **{"row": cell.row.name, "rate": cell.rate, "steps": cell.steps, "seed": cell.seed},
            "recipe": cell.recipe.to_dict(),
            "counts": {part: asdict(count) for part, count in model.parameter_counts().items()},
            "macs": macs(model, parts.transform.size),
            "losses": _losses(self.folder / cell.key),
            "answers": answers,
            "validation": likelihood,
            "seconds": {"train": round(trained - began, 1), "ask": round(time.perf_counter() - trained, 1)},
        }

    def ask_test(self, cell: Cell) -> Record:
        """Ask a finished cell test photos."""
        began = time.perf_counter()
        parts = self._trained(cell)
        answers, _ = self.photos.classify("test", parts.model.eval(), build_feature_source(parts, cell.recipe))
        of = {"row": cell.row.name, "rate": cell.rate, "steps": cell.steps, "seed": cell.seed}
        return {**of, "answers": answers, "seconds": {"ask": round(time.perf_counter() - began, 1)}}

    def _trained(self, cell: Cell) -> ModelAndPreprocessing:
        """The model of a cell: trained, resumed where it was stopped, or loaded where it is finished. The others start
        from the run of 0 steps, whose heads are in closed form of photos that never train."""
        run = RunFolder(self.folder / cell.key)
        if (run.path / "delta.safetensors").exists() and not run.has_state:
            loaded = load(run.path)
            assert isinstance(loaded.encoder, DualEncoder)
            return ModelAndPreprocessing(loaded.encoder, loaded.transform, loaded.tokenizer)
        recipe, (train, few) = cell.recipe, self.photos.pairs(PAIRS, cell.seed)
        if cell.steps == 0:
            train = self.photos.outside
        else:
            recipe = recipe.with_overrides([f"train.init_from={self._start(cell.row)}"])
        parts = build_model_and_preprocessing(recipe)
        preloaded = Preloaded((train, few), parts)
        done = train_recipe(recipe, run.path, say=_nobody, resume=run.has_state, preloaded=preloaded)
        if done.fitted.interrupted:
            raise KeyboardInterrupt
        return parts

    def _start(self, row: Row) -> Path:
        """The run of 0 steps of a row; trained again where it is recorded and its folder is gone."""
        cell = start_of(row)
        with _held(self.folder / f"{cell.key}.lock", wait=True):
            self._trained(cell)
        return self.folder / cell.key


@contextmanager
def _held(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process got the lock of a file, which it holds for as long as the context lasts; ``wait`` until it
    has it."""
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [round(line["loss"], 4) for line in lines if line["event"] == "step"]


def _nobody(line: str) -> None:
    """A reporter that ignores all lines."""
