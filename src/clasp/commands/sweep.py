"""A grid of settings: every combination trained as a run of its own, and the runs ranked by validation.

Input: a recipe and ``train.lr=1e-3,3e-3``. Output: run folders side by side, ``sweep.jsonl`` with a line for each, and
the rows of a table. Frozen features are computed by the first run and read from the feature cache by the others; pairs
and wholly frozen towers stay in memory. Note: the only state is in the run folders, so a sweep that was interrupted, or
is repeated with more values, trains the missing runs only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clasp.commands.repeated_lines import said_once
from clasp.commands.run_context import Preloaded
from clasp.commands.train import train_recipe
from clasp.config.build import ModelAndPreprocessing, build_model, build_model_and_preprocessing, rebuild_heads
from clasp.config.datasets import TrainValPairs, open_all_pairs, select_training_pairs
from clasp.config.grid import GridPoint, GridSpec
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.config.run_plan import count_samples_per_epoch, hash_pairs
from clasp.data.atomic_files import read_json_lines
from clasp.data.folder_lock import lock_folder
from clasp.data.pairs import Pairs
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
from clasp.training.run_code import all_code_names, allow_code
from clasp.training.run_folder import RunFolder
from clasp.training.settings import plan_training
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
    """Train every combination of ``grid`` into ``runs``/``name``, or resume the same sweep.

    Raises ``UserError`` for an error in any of them before anything is computed. A run that fails later is a row.
    """
    made = grid.expand()
    shared_objects = _SharedObjects()
    shared_objects.check(made)
    with allow_code({name for one in made for name in all_code_names(one.recipe.to_dict()).values()}):
        return _run_grid(grid, made, runs, name, shared_objects, SweepCallbacks(said_once(say), bar, reporter))


@dataclass(frozen=True, slots=True)
class SweepCallbacks:
    """Where a sweep reports: lines, progress bars, and a new reporter for each run."""

    say: MessageCallback
    bar: ProgressFactory
    reporter: Callable[[], Reporter]


def _run_grid(
    grid: GridSpec,
    made: Sequence[GridPoint],
    runs: Path,
    name: str | None,
    shared_objects: _SharedObjects,
    callbacks: SweepCallbacks,
) -> SweepResult:
    """Choose the folder, lock it, and train what is missing in it."""
    new = [SweepRow(one.name, (*grid.overrides, *one.settings), one.settings, "stopped") for one in made]
    folder = _choose_folder(
        runs, name or f"{Path(grid.source).stem}-sweep", made, new[0].sweep_key, shared_objects, numbered=name is None
    )
    rows: list[SweepRow] = []
    with lock_folder(folder) as require_held:
        known = read_sweep_rows(folder)
        for place, (one, row) in enumerate(zip(made, new, strict=True), 1):
            run = folder / one.name
            row = replace(row, run=str(run))
            if _is_finished(run):
                row = read_finished_row(row)
            else:
                callbacks.say(f"run {place} of {len(made)}: {one}")
                row = _train(one.recipe, row, shared_objects, callbacks)
                require_held()
            rows.append(row)
            known[row.run] = row
            write_sweep_rows(folder, known.values())
            if row.state == "stopped":
                break
            _stop_on_repeated_failure(rows)
    return SweepResult(folder, sorted(rows, key=ranking_key), rows[-1].state == "stopped", len(made))


# --- objects shared between runs -------------------------------------------------------------------------------------


class _SharedObjects:
    """Pairs and towers that runs reuse."""

    def __init__(self) -> None:
        self._pairs: dict[str, TrainValPairs] = {}
        self._content: dict[str, str] = {}
        self._last: tuple[ModelAndPreprocessing, Recipe] | None = None

    def check(self, made: Sequence[GridPoint]) -> None:
        """Find what a recipe alone cannot tell: trackers, towers, methods, pairs, batches. Loads no weights."""
        counted = set()
        for one in made:
            try:
                if one.recipe.auto is not None:
                    raise UserError("a grid varies a recipe without [auto], which varies settings itself")
                find_trackers(one.recipe.train.trackers)
                parts = one.recipe.model_dump_json(include={"image", "text", "share", "tune", "head", "loss"})
                if parts not in counted:
                    build_model(one.recipe, meta=True)
                    counted.add(parts)
                plan_training(one.recipe.train, count_samples_per_epoch(self.training_pairs(one.recipe), one.recipe))
            except UserError as error:
                raise UserError(f"with {one}: {error}") from None

    def pairs(self, recipe: Recipe) -> TrainValPairs:
        """The pairs of a recipe, whatever its ``data.max_pairs``, opened once."""
        key = _pairs_key(recipe)
        if key not in self._pairs:
            self._pairs[key] = open_all_pairs(recipe)
        return self._pairs[key]

    def training_pairs(self, recipe: Recipe) -> Pairs:
        """Those that the recipe trains on."""
        return select_training_pairs(recipe, self.pairs(recipe))

    def pairs_hash(self, recipe: Recipe) -> str:
        """The hash of the pairs of a recipe, as saved in a run."""
        key = f"{_pairs_key(recipe)} {recipe.data.max_pairs}"
        if key not in self._content:
            self._content[key] = hash_pairs(PairIndex(self.training_pairs(recipe)), self.pairs(recipe)[1])
        return self._content[key]

    def parts(self, recipe: Recipe) -> ModelAndPreprocessing:
        """The model of a recipe; reuses the towers of the previous one where they are the same and wholly frozen."""
        if self._last is not None and _towers_unchanged(*self._last, recipe):
            self._last = rebuild_heads(self._last[0], recipe), recipe
        else:
            self._last = None  # frees the old towers before the new ones are loaded
            train = self.training_pairs(recipe)
            self._last = build_model_and_preprocessing(recipe, lambda: PairIndex(train).texts), recipe
        return self._last[0]


def _towers_unchanged(parts: ModelAndPreprocessing, then: Recipe, now: Recipe) -> bool:
    """Whether both towers match the recipe ``now`` and are unchanged since loading."""
    one, other = ((of.image, of.text, of.share, of.tune.image, of.tune.text) for of in (then, now))
    own = any(
        settings.net is not None for settings in (now.image, now.text)
    )  # initialised from a seed, or with a vocabulary from the data
    if one != other or (own and (then.train.seed, then.data) != (now.train.seed, now.data)):
        return False
    return all(tower.fully_frozen and tower.pooling is None for tower in (parts.model.image, parts.model.text))


def _pairs_key(recipe: Recipe) -> str:
    return recipe.data.model_dump_json(
        include={"train", "val", "format", "val_fraction", "image_root", "columns", "languages"}
    )


# --- one run ---------------------------------------------------------------------------------------------------------


def _train(recipe: Recipe, row: SweepRow, shared_objects: _SharedObjects, callbacks: SweepCallbacks) -> SweepRow:
    """Train or resume one run; returns its row."""
    run = Path(row.run)
    resume = RunFolder(run).has_state
    try:
        if resume:
            recipe = recipe_from_dict(RunFolder(run).recipe(), str(run / "recipe.toml"))
        shared = Preloaded(shared_objects.pairs(recipe), shared_objects.parts(recipe))
        done = train_recipe(
            recipe,
            run,
            say=callbacks.say,
            bar=callbacks.bar,
            reporter=callbacks.reporter(),
            resume=resume,
            preloaded=shared,
        )
    except KeyboardInterrupt:
        return replace(row, seconds=read_training_seconds(run))
    except UserError as error:
        return replace(row, state="failed", error=str(error))
    return replace(row, seconds=read_training_seconds(run)) if done.fitted.interrupted else read_finished_row(row)


def _is_finished(run: Path) -> bool:
    return (run / "delta.safetensors").exists() and not RunFolder(run).has_state


def _stop_on_repeated_failure(rows: Sequence[SweepRow]) -> None:
    """Raise ``UserError`` when the first two runs failed alike before a first step: the cause is not a setting."""
    errors = [row.error.replace(row.run, "") for row in rows]
    if len(rows) == 2 and errors[0] and errors[0] == errors[1] and not any(_has_started(Path(row.run)) for row in rows):
        raise UserError(rows[1].error)


def _has_started(run: Path) -> bool:
    log = run / "log.jsonl"
    return log.exists() and any(row["event"] == "start" for row in read_json_lines(log))


# --- the folder ------------------------------------------------------------------------------------------------------


def _choose_folder(
    runs: Path,
    name: str,
    made: Sequence[GridPoint],
    sweep: tuple[Any, ...],
    shared_objects: _SharedObjects,
    *,
    numbered: bool,
) -> Path:
    """The folder of the sweep: ``runs/name``; if that is taken and ``numbered``, the next free number."""
    for count in itertools.count(1):
        folder = runs / (name if count == 1 else f"{name}-{count}")
        other = _conflict(folder, made, sweep, shared_objects)
        if other is None:
            return folder
        if not numbered:
            raise UserError(f"{other}; choose another name with --name, or delete it")
    raise AssertionError


def _conflict(
    folder: Path, made: Sequence[GridPoint], sweep: tuple[Any, ...], shared_objects: _SharedObjects
) -> str | None:
    """The reason why this folder cannot hold the sweep, or ``None``."""
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file"
    if (folder / "recipe.toml").exists():
        return f"{folder} holds a run, not a sweep"
    if any(row.sweep_key != sweep for row in read_sweep_rows(folder).values()):
        return f"{folder} holds another sweep"
    for one in made:
        run = folder / one.name
        trained = (run / "delta.safetensors").exists() or RunFolder(run).has_state
        if trained and not _matches_recipe(run, one.recipe):
            return f"{run} holds a run with other settings"
        if trained and RunFolder(run).base().get("pairs") != shared_objects.pairs_hash(one.recipe):
            return f"{run} holds a run on pairs of {one.recipe.data.train} that have changed since"
    return None


def _matches_recipe(run: Path, recipe: Recipe) -> bool:
    """Whether a run has this recipe, apart from resolved "auto" and "all" values."""
    try:
        written = recipe_from_dict(RunFolder(run).recipe(), str(run))
    except UserError:
        return False
    settings = recipe.train.model_dump()
    auto = {key: written.train.model_dump()[key] for key, value in settings.items() if value == "auto"}
    updated = recipe.model_copy(update={"train": recipe.train.model_copy(update=auto)})
    if recipe.image.extra_layers == "all":
        layers = {"extra_layers": written.image.extra_layers}
        updated = updated.model_copy(update={"image": recipe.image.model_copy(update=layers)})
    if recipe.text.extra_layers == "all":
        layers = {"extra_layers": written.text.extra_layers}
        updated = updated.model_copy(update={"text": recipe.text.model_copy(update=layers)})
    return not updated.differs_from(written.to_dict())
