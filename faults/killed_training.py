"""``kill -9`` at random moments of training: the run goes on, to bitwise the weights of one that was never interrupted.

Input: the world and a number of kills. Output: a ``CaseCount``. A chain is one run: started, killed, resumed (or
started again where no state was saved, as the message says), killed, ... until it ends. Every other chain trains inside
the towers; of the others, which read cached features, every other one loses its cache in between.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clasp.config.recipe import Recipe
from clasp.training.run_folder import RunFolder
from faults.child import run_in_child
from faults.counts import CaseCount
from faults.world import ADAPTED, World, run_answer
from toyruns import run

_LOST = "lost"
_AGAIN = "started again, killed before the first state"


def killed_training(world: World, trials: int = 50) -> CaseCount:
    """``trials`` kills; a chain that ends otherwise than the uninterrupted run counts as lost."""
    chance, outcomes, failures, done = world.chance("training"), Counter[str](), [], 0
    kinds = [_Reference(world, "adapted", ADAPTED), _Reference(world, "locked", ())]
    for number in itertools.count():
        kind = kinds[number % 2]
        folder, kept = world.folder / f"chain-{number}", number % 4 != 1
        while True:
            moment = chance.uniform(0, kind.seconds) if done < trials else None
            resumed = RunFolder(folder).has_state
            ended = run_in_child(lambda kind=kind, folder=folder: kind.go_on(folder), kill_after=moment)
            if not ended.was_killed:
                break
            done += 1
            outcomes["resumed" if RunFolder(folder).has_state else "ended already" if is_whole(folder) else _AGAIN] += 1
            if not kept:
                shutil.rmtree(world.folder / kind.cache, ignore_errors=True)
        same = ended.code == 0 and ended.answer == kind.answer
        if not same:
            failures.append(f"chain {number} ({kind.cache}, resumed {resumed}): {ended.describe()}")
        outcomes["runs ended, each bitwise as uninterrupted" if same else _LOST] += 1
        shutil.rmtree(folder, ignore_errors=True)
        if done >= trials:
            break
    return CaseCount(
        "`kill -9` at a random moment of training",
        "goes on with `clasp resume`, or starts again where nothing was saved; bitwise the same weights and results",
        "training",
        done,
        dict(outcomes),
        tuple(failures),
    )


class _Reference:
    """A recipe, and the run of it that nothing interrupts."""

    def __init__(self, world: World, cache: str, overrides: Sequence[str]):
        self.world, self.cache = world, f"cache-{cache}"
        self.recipe: Recipe = world.recipe(*overrides)
        began = time.monotonic()
        ended = run_in_child(lambda: self.go_on(world.folder / f"reference-{cache}"))
        self.seconds = time.monotonic() - began
        assert ended.code == 0, ended.said
        self.answer = ended.answer

    def go_on(self, folder: Path) -> object:
        """What a user does after each kill."""
        self.world.cached_in(self.cache)
        if not is_whole(folder):
            run(self.recipe, folder, resume=RunFolder(folder).has_state)
        return run_answer(folder)


def is_whole(folder: Path) -> bool:
    """Whether a kill came after the run had ended: it has its weights and no state."""
    return (folder / "delta.safetensors").exists() and not RunFolder(folder).has_state
