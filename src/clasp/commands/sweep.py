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

from clasp.commands.train import Opened, align, content_hash, samples, training_pairs
from clasp.config.build import Assembled, assemble, build, under_other_heads
from clasp.config.grid import Combination, combinations
from clasp.config.recipe import Recipe, from_dict
from clasp.data.readers import Listing
from clasp.models.features import Bar, Say, no_bar
from clasp.report.leaderboard import Row, Swept, finished, rank, read_rows, seconds_of, write_rows
from clasp.training.loop import choose
from clasp.training.run_folder import Run
from clasp.training.trackers.console import Reporter, Silent
from clasp.types import UserError


def sweep(
    source: str,
    overrides: Sequence[str],
    grid: Sequence[str],
    runs: Path,
    name: str | None = None,
    *,
    say: Say,
    bar: Bar = no_bar,
    reporter: Callable[[], Reporter] = Silent,
) -> Swept:
    """Train every combination of ``grid`` into ``runs``/``name``, or go on where the same sweep was stopped.

    Raises ``UserError`` for a mistake in any of them, before anything is computed. One that fails later is a row.
    """
    made = combinations(source, overrides, grid)
    desk = _Desk()
    desk.check(made)
    new = [Row(one.name, (*overrides, *one.settings), one.settings, "stopped") for one in made]
    folder = _folder(runs, name or f"{Path(source).stem}-sweep", made, new[0].sweep, desk, numbered=name is None)
    known, rows = read_rows(folder), []
    for place, (one, row) in enumerate(zip(made, new, strict=True), 1):
        run = folder / one.name
        row = replace(row, run=str(run))
        if _is_finished(run):
            row = finished(row)
        else:
            say(f"run {place} of {len(made)}: {one}")
            row = _train(one.recipe, row, desk, say=say, bar=bar, reporter=reporter())
        rows.append(row)
        known[row.run] = row
        write_rows(folder, known.values())
        if row.state == "stopped":
            break
        _refuse_the_same_again(rows)
    return Swept(folder, sorted(rows, key=rank), rows[-1].state == "stopped", len(made))


# --- what runs have in common ----------------------------------------------------------------------------------------


class _Desk:
    """Pairs and towers that one run leaves for the next."""

    def __init__(self) -> None:
        self._pairs: dict[str, Opened] = {}
        self._content: dict[str, str] = {}
        self._last: tuple[Assembled, Recipe] | None = None

    def check(self, made: Sequence[Combination]) -> None:
        """Find what a recipe alone cannot tell: towers, methods, pairs, batches. Loads no weights."""
        counted = set()
        for one in made:
            try:
                parts = one.recipe.model_dump_json(include={"image", "text", "share", "tune", "head", "loss"})
                if parts not in counted:
                    build(one.recipe, meta=True)
                    counted.add(parts)
                choose(one.recipe.train, samples(self.pairs(one.recipe)[0], one.recipe))
            except UserError as error:
                raise UserError(f"with {one}: {error}") from None

    def pairs(self, recipe: Recipe) -> Opened:
        """The pairs of a recipe, opened once."""
        key = _which_pairs(recipe)
        if key not in self._pairs:
            self._pairs[key] = training_pairs(recipe)
        return self._pairs[key]

    def content(self, recipe: Recipe) -> str:
        """The hash of the pairs of a recipe, as a run keeps it."""
        key = _which_pairs(recipe)
        if key not in self._content:
            train, val = self.pairs(recipe)
            self._content[key] = content_hash(Listing(train), val)
        return self._content[key]

    def parts(self, recipe: Recipe) -> Assembled:
        """The model of a recipe, around the towers of the last where they are the same and nothing in them moves."""
        if self._last is not None and _stays(*self._last, recipe):
            self._last = under_other_heads(self._last[0], recipe), recipe
        else:
            self._last = None  # the old towers go before the new ones come
            train, _ = self.pairs(recipe)
            self._last = assemble(recipe, lambda: Listing(train).texts), recipe
        return self._last[0]


def _stays(parts: Assembled, then: Recipe, now: Recipe) -> bool:
    """Whether both towers are as ``now`` wants them, and as they were loaded."""
    one, other = ((of.image, of.text, of.share, of.tune.image, of.tune.text) for of in (then, now))
    own = any(settings.net is not None for settings in (now.image, now.text))  # drawn from a seed, or words of the data
    if one != other or (own and (then.train.seed, _which_pairs(then)) != (now.train.seed, _which_pairs(now))):
        return False
    return all(tower.wholly_frozen and tower.pooling is None for tower in (parts.model.image, parts.model.text))


def _which_pairs(recipe: Recipe) -> str:
    return recipe.data.model_dump_json(include={"train", "val", "val_fraction", "image_root", "columns", "languages"})


# --- one run ---------------------------------------------------------------------------------------------------------


def _train(recipe: Recipe, row: Row, desk: _Desk, *, say: Say, bar: Bar, reporter: Reporter) -> Row:
    """The row of a run that is begun, or gone on with."""
    run = Path(row.run)
    resume = (run / "state").exists()
    try:
        if resume:
            recipe = from_dict(Run(run).recipe(), str(run / "recipe.toml"))
        shared = {"pairs": desk.pairs(recipe), "parts": desk.parts(recipe)}
        done = align(recipe, run, say=say, bar=bar, reporter=reporter, resume=resume, **shared)
    except KeyboardInterrupt:
        return replace(row, seconds=seconds_of(run))
    except UserError as error:
        return replace(row, state="failed", error=str(error))
    return replace(row, seconds=seconds_of(run)) if done.fitted.interrupted else finished(row)


def _is_finished(run: Path) -> bool:
    return (run / "delta.safetensors").exists() and not (run / "state").exists()


def _refuse_the_same_again(rows: Sequence[Row]) -> None:
    """``UserError`` when the first two runs failed alike before a first step: the data are at fault, and no setting."""
    said = [row.error.replace(row.run, "") for row in rows]
    if len(rows) == 2 and said[0] and said[0] == said[1] and not any(_took_a_step(Path(row.run)) for row in rows):
        raise UserError(rows[1].error)


def _took_a_step(run: Path) -> bool:
    log = run / "log.jsonl"
    return log.exists() and any(json.loads(line)["event"] == "start" for line in log.read_text("utf-8").splitlines())


# --- the folder ------------------------------------------------------------------------------------------------------


def _folder(
    runs: Path, name: str, made: Sequence[Combination], sweep: tuple[Any, ...], desk: _Desk, *, numbered: bool
) -> Path:
    """Where the runs go: ``runs/name``, unless something else is there; then the next number, if we may."""
    for count in itertools.count(1):
        folder = runs / (name if count == 1 else f"{name}-{count}")
        other = _other(folder, made, sweep, desk)
        if other is None:
            return folder
        if not numbered:
            raise UserError(f"{other}; choose another name with --name, or delete it")
    raise AssertionError


def _other(folder: Path, made: Sequence[Combination], sweep: tuple[Any, ...], desk: _Desk) -> str | None:
    """What is in the way of a sweep in this folder."""
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file"
    if (folder / "recipe.toml").exists():
        return f"{folder} holds a run, and no sweep"
    if any(row.sweep != sweep for row in read_rows(folder).values()):
        return f"{folder} holds another sweep"
    for one in made:
        run = folder / one.name
        trained = (run / "delta.safetensors").exists() or (run / "state").exists()
        if trained and not _is_of(run, one.recipe):
            return f"{run} holds a run with other settings"
        if trained and json.loads((run / "base.json").read_text("utf-8"))["pairs"] != desk.content(one.recipe):
            return f"{run} holds a run on pairs of {one.recipe.data.train} that have changed since"
    return None


def _is_of(run: Path, recipe: Recipe) -> bool:
    """Whether a run was made of this recipe: as it was written, but for what "auto" has become."""
    try:
        written = from_dict(Run(run).recipe(), str(run)).to_dict()
    except UserError:
        return False
    wanted = recipe.to_dict()
    wanted["train"] = {
        key: written["train"].get(key) if value == "auto" else value for key, value in wanted["train"].items()
    }
    return wanted == written
