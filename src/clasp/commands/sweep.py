"""A grid of settings: every combination trained as a run of its own, and the runs ranked by validation.

In goes a recipe and ``train.lr=1e-3,3e-3``; out come run folders side by side, ``sweep.jsonl`` with a line for each,
and the rows of a table. What is frozen is computed for the first run and read from the cache by the others; pairs, and
towers in which nothing trains, stay in memory. Unusual: the run folders are all that is remembered, so a sweep that was
stopped, or is typed again with more values, trains what is not there yet.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clasp.commands.run_context import Preloaded
from clasp.commands.train import train_recipe
from clasp.config.build import ModelAndPreprocessing, build_model, build_model_and_preprocessing, rebuild_heads
from clasp.config.datasets import TrainValPairs, count_samples_per_epoch, hash_pairs, open_training_pairs
from clasp.config.grid import GridPoint, GridSpec
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.data.readers import PairIndex
from clasp.report.leaderboard import (
    SweepResult,
    SweepRow,
    ranking_key,
    read_finished_row,
    read_sweep_rows,
    read_training_seconds,
    write_sweep_rows,
)
from clasp.training.loop import plan_training
from clasp.training.run_folder import RunFolder
from clasp.training.trackers.console import Reporter, SilentReporter
from clasp.training.trackers.registry import find_trackers
from clasp.types import MessageCallback, ProgressFactory, UserError, no_progress_bar


def sweep(
    grid: GridSpec,
    runs: Path,
    name: str | None = None,
    *,
    say: MessageCallback,
    bar: ProgressFactory = no_progress_bar,
    reporter: Callable[[], Reporter] = SilentReporter,
) -> SweepResult:
    """Train every combination of ``grid`` into ``runs``/``name``, or go on where the same sweep was stopped.

    Raises ``UserError`` for a mistake in any of them, before anything is computed. One that fails later is a row.
    """
    made = grid.expand()
    desk = _SharedObjects()
    desk.check(made)
    new = [SweepRow(one.name, (*grid.overrides, *one.settings), one.settings, "stopped") for one in made]
    folder = _choose_folder(
        runs, name or f"{Path(grid.source).stem}-sweep", made, new[0].sweep_key, desk, numbered=name is None
    )
    known, rows = read_sweep_rows(folder), []
    for place, (one, row) in enumerate(zip(made, new, strict=True), 1):
        run = folder / one.name
        row = replace(row, run=str(run))
        if _is_finished(run):
            row = read_finished_row(row)
        else:
            say(f"run {place} of {len(made)}: {one}")
            row = _train(one.recipe, row, desk, say=say, bar=bar, reporter=reporter())
        rows.append(row)
        known[row.run] = row
        write_sweep_rows(folder, known.values())
        if row.state == "stopped":
            break
        _stop_on_repeated_failure(rows)
    return SweepResult(folder, sorted(rows, key=ranking_key), rows[-1].state == "stopped", len(made))


# --- what runs have in common ----------------------------------------------------------------------------------------


class _SharedObjects:
    """Pairs and towers that one run leaves for the next."""

    def __init__(self) -> None:
        self._pairs: dict[str, TrainValPairs] = {}
        self._content: dict[str, str] = {}
        self._last: tuple[ModelAndPreprocessing, Recipe] | None = None

    def check(self, made: Sequence[GridPoint]) -> None:
        """Find what a recipe alone cannot tell: trackers, towers, methods, pairs, batches. Loads no weights."""
        counted = set()
        for one in made:
            try:
                find_trackers(one.recipe.train.trackers)
                parts = one.recipe.model_dump_json(include={"image", "text", "share", "tune", "head", "loss"})
                if parts not in counted:
                    build_model(one.recipe, meta=True)
                    counted.add(parts)
                plan_training(one.recipe.train, count_samples_per_epoch(self.pairs(one.recipe)[0], one.recipe))
            except UserError as error:
                raise UserError(f"with {one}: {error}") from None

    def pairs(self, recipe: Recipe) -> TrainValPairs:
        """The pairs of a recipe, opened once."""
        key = _pairs_key(recipe)
        if key not in self._pairs:
            self._pairs[key] = open_training_pairs(recipe)
        return self._pairs[key]

    def pairs_hash(self, recipe: Recipe) -> str:
        """The hash of the pairs of a recipe, as a run keeps it."""
        key = _pairs_key(recipe)
        if key not in self._content:
            train, val = self.pairs(recipe)
            self._content[key] = hash_pairs(PairIndex(train), val)
        return self._content[key]

    def parts(self, recipe: Recipe) -> ModelAndPreprocessing:
        """The model of a recipe, around the towers of the last where they are the same and nothing in them moves."""
        if self._last is not None and _towers_unchanged(*self._last, recipe):
            self._last = rebuild_heads(self._last[0], recipe), recipe
        else:
            self._last = None  # the old towers go before the new ones come
            train, _ = self.pairs(recipe)
            self._last = build_model_and_preprocessing(recipe, lambda: PairIndex(train).texts), recipe
        return self._last[0]


def _towers_unchanged(parts: ModelAndPreprocessing, then: Recipe, now: Recipe) -> bool:
    """Whether both towers are as ``now`` wants them, and as they were loaded."""
    one, other = ((of.image, of.text, of.share, of.tune.image, of.tune.text) for of in (then, now))
    own = any(settings.net is not None for settings in (now.image, now.text))  # drawn from a seed, or words of the data
    if one != other or (own and (then.train.seed, _pairs_key(then)) != (now.train.seed, _pairs_key(now))):
        return False
    return all(tower.fully_frozen and tower.pooling is None for tower in (parts.model.image, parts.model.text))


def _pairs_key(recipe: Recipe) -> str:
    return recipe.data.model_dump_json(
        include={"train", "val", "format", "val_fraction", "image_root", "columns", "languages"}
    )


# --- one run ---------------------------------------------------------------------------------------------------------


def _train(
    recipe: Recipe,
    row: SweepRow,
    desk: _SharedObjects,
    *,
    say: MessageCallback,
    bar: ProgressFactory,
    reporter: Reporter,
) -> SweepRow:
    """The row of a run that is begun, or gone on with."""
    run = Path(row.run)
    resume = (run / "state").exists()
    try:
        if resume:
            recipe = recipe_from_dict(RunFolder(run).recipe(), str(run / "recipe.toml"))
        shared = Preloaded(desk.pairs(recipe), desk.parts(recipe))
        done = train_recipe(recipe, run, say=say, bar=bar, reporter=reporter, resume=resume, preloaded=shared)
    except KeyboardInterrupt:
        return replace(row, seconds=read_training_seconds(run))
    except UserError as error:
        return replace(row, state="failed", error=str(error))
    return replace(row, seconds=read_training_seconds(run)) if done.fitted.interrupted else read_finished_row(row)


def _is_finished(run: Path) -> bool:
    return (run / "delta.safetensors").exists() and not (run / "state").exists()


def _stop_on_repeated_failure(rows: Sequence[SweepRow]) -> None:
    """``UserError`` when the first two runs failed alike before a first step: the data are at fault, and no setting."""
    said = [row.error.replace(row.run, "") for row in rows]
    if len(rows) == 2 and said[0] and said[0] == said[1] and not any(_has_started(Path(row.run)) for row in rows):
        raise UserError(rows[1].error)


def _has_started(run: Path) -> bool:
    log = run / "log.jsonl"
    return log.exists() and any(json.loads(line)["event"] == "start" for line in log.read_text("utf-8").splitlines())


# --- the folder ------------------------------------------------------------------------------------------------------


def _choose_folder(
    runs: Path, name: str, made: Sequence[GridPoint], sweep: tuple[Any, ...], desk: _SharedObjects, *, numbered: bool
) -> Path:
    """Where the runs go: ``runs/name``, unless something else is there; then the next number, if we may."""
    for count in itertools.count(1):
        folder = runs / (name if count == 1 else f"{name}-{count}")
        other = _conflict(folder, made, sweep, desk)
        if other is None:
            return folder
        if not numbered:
            raise UserError(f"{other}; choose another name with --name, or delete it")
    raise AssertionError


def _conflict(folder: Path, made: Sequence[GridPoint], sweep: tuple[Any, ...], desk: _SharedObjects) -> str | None:
    """What is in the way of a sweep in this folder."""
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file"
    if (folder / "recipe.toml").exists():
        return f"{folder} holds a run, and no sweep"
    if any(row.sweep_key != sweep for row in read_sweep_rows(folder).values()):
        return f"{folder} holds another sweep"
    for one in made:
        run = folder / one.name
        trained = (run / "delta.safetensors").exists() or (run / "state").exists()
        if trained and not _matches_recipe(run, one.recipe):
            return f"{run} holds a run with other settings"
        if trained and json.loads((run / "base.json").read_text("utf-8"))["pairs"] != desk.pairs_hash(one.recipe):
            return f"{run} holds a run on pairs of {one.recipe.data.train} that have changed since"
    return None


def _matches_recipe(run: Path, recipe: Recipe) -> bool:
    """Whether a run was made of this recipe: as it was written, but for what "auto" has become."""
    try:
        written = recipe_from_dict(RunFolder(run).recipe(), str(run))
    except UserError:
        return False
    settings = recipe.train.model_dump()
    auto = {key: written.train.model_dump()[key] for key, value in settings.items() if value == "auto"}
    return not recipe.model_copy(update={"train": recipe.train.model_copy(update=auto)}).differs_from(written.to_dict())
