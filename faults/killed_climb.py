"""``kill -9`` at random moments of ``clasp train auto``: it goes on, to bitwise the run of one that nothing interrupts.

Input: the world and a number of kills. Output: a ``CaseCount``. A chain is one run: begun, killed, resumed (or begun
again where no plan was written), killed, ... until it ends. Note: its budget is in steps, so that no stage depends on
the time; all chains are in one folder, since the recipes of stages name it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from clasp.training.file_names import PLAN_FILE

from clasp.commands.auto import climb, resume_climb
from clasp.commands.auto_stages import AutoCallbacks
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.report.auto_table import AutoPlan
from faults.child import run_in_child
from faults.counts import CaseCount
from faults.world import World, run_answer

_STEPS = 30  # five a epoch: the first method of tuning, in part of them


def killed_climb(world: World, trials: int = 20) -> CaseCount:
    """``trials`` kills; a chain that ends otherwise than the uninterrupted run counts as lost."""
    chance, outcomes, failures, done = world.chance("auto"), Counter[str](), [], 0
    folder, made = world.folder / "climb", _recipe(world)
    _uninterrupted(world, made, folder)  # fills the feature cache
    answer, seconds = _uninterrupted(world, made, folder)
    for _ in range(3 * trials):
        if done >= trials:
            break
        shutil.rmtree(folder, ignore_errors=True)
        while True:
            moment = chance.uniform(0, seconds) if done < trials else None
            ended = run_in_child(lambda: _go_on(world, made, folder), kill_after=moment)
            if not ended.was_killed:
                break
            done += 1
            outcomes["resumed" if (folder / PLAN_FILE).exists() else "begun again"] += 1
        same = ended.code == 0 and ended.answer == answer
        if not same:
            failures.append(f"after {done} kills: {ended.describe()}")
        outcomes["runs ended, each bitwise as uninterrupted" if same else "lost"] += 1
    return CaseCount(
        "`kill -9` at a random moment of `clasp train auto`",
        "goes on with `clasp resume`; bitwise the same weights and results, and the same stages kept",
        "auto",
        done,
        dict(outcomes),
        tuple(failures),
    )


def _uninterrupted(world: World, made: Recipe, folder: Path) -> tuple[object, float]:
    """What the run ends with that nothing interrupts, and its seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    ended = run_in_child(lambda: _go_on(world, made, folder))
    assert ended.code == 0, ended.said
    return ended.answer, time.monotonic() - began


def _recipe(world: World) -> Recipe:
    towers = {side: {"tower": f"file:{world.towers / side}"} for side in ("image", "text")}
    data = {"train": str(world.pairs), "val_fraction": 0.25}
    # the attention kernel would be chosen by timing it
    train = {"precision": "float32", "attention": "plain", "seed": 1, "save_every_minutes": 1e-4}
    return recipe_from_dict({**towers, "data": data, "train": train, "auto": {"steps": _STEPS}}, "toy")


def _go_on(world: World, made: Recipe, folder: Path) -> object:
    """What a user does after each kill."""
    world.cached_in("cache-climb")
    if not (folder / PLAN_FILE).exists():
        climb(made, folder, AutoCallbacks(lambda line: None))
    elif not AutoPlan.read(folder).finished:
        resume_climb(folder, AutoCallbacks(lambda line: None))
    plan = AutoPlan.read(folder)
    stages = [replace(row, seconds=0, reason="") for row in plan.rows if row.stage]
    return {**run_answer(folder), "best": plan.best, "stages": json.dumps([str(row) for row in stages])}
