"""``kill -9`` of one of two processes that train together: the other ends with a line, and the run goes on.

Input: the world and a number of kills. Output: a ``CaseCount``. A chain is one run: started on two processes, one of
them killed, resumed on two (or started again where no state was saved), killed, ... until it ends. Every other chain
reads cached features, which the first process computes, and every other of these loses its cache in between. Note:
moments are counted from when the processes have found each other; before that the launcher ends the other.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from clasp.commands.run_context import Preloaded
from clasp.commands.train import train_recipe
from clasp.training.distributed import open_processes
from clasp.training.run_folder import RunFolder
from faults.child import Child, Ended
from faults.counts import CaseCount
from faults.killed_training import is_whole
from faults.world import ADAPTED, World, run_answer

SECONDS = 30
"""Within which the other process must have ended"""


def killed_process(world: World, trials: int = 20) -> CaseCount:
    """``trials`` kills; a chain that ends otherwise than the uninterrupted run of two processes counts as lost."""
    chance, outcomes, failures, done = world.chance("processes"), Counter[str](), [], 0
    kinds = [_Pair(world, "pair-adapted", ADAPTED), _Pair(world, "pair-locked", ())]
    slowest = 0.0
    for number in itertools.count():
        kind, folder = kinds[number % 2], world.folder / f"pair-{number}"
        while True:
            moment, victim = (chance.uniform(0, kind.seconds), chance.randrange(2)) if done < trials else (None, 0)
            killed, other, seconds = kind.go_on(folder, victim, moment)
            if not killed.was_killed:
                break
            done, slowest = done + 1, max(slowest, seconds)
            told = other.is_refusal and "since another has ended" in other.said
            kept = (told or other.code == 0) and seconds <= SECONDS
            if not kept:
                failures.append(
                    f"kill {done} of process {victim}: the other, {seconds:.1f} s later: {other.describe()}"
                )
            well = "the other ended with the reason" if told else "the other had done its part"
            outcomes[well if kept else "the other failed or was late"] += 1
            if number % 4 == 1:
                shutil.rmtree(world.folder / kind.cache, ignore_errors=True)
        first = killed if victim == 0 else other
        same = first.code == 0 and first.answer == kind.answer
        if not same:
            failures.append(f"chain {number} ({kind.cache}): {first.describe()}")
        outcomes["runs ended, each bitwise as uninterrupted" if same else "lost"] += 1
        shutil.rmtree(folder, ignore_errors=True)
        if done >= trials:
            break
    return CaseCount(
        f"`kill -9` of one of two processes of a run; the other ended within {slowest:.1f} seconds",
        f"the other ends within {SECONDS} seconds with a line; resumed, bitwise the run of two that nothing interrupts",
        "killed-process",
        done,
        dict(outcomes),
        tuple(failures),
    )


class _Pair:
    """A recipe, and the run of it on two processes that nothing interrupts."""

    def __init__(self, world: World, cache: str, overrides: Sequence[str]):
        self.world, self.cache, self.recipe = world, cache, world.recipe(*overrides)
        began = time.monotonic()
        first, second, _ = self.go_on(world.folder / f"reference-{cache}", 0, None)
        self.seconds = time.monotonic() - began
        assert first.code == second.code == 0, first.said + second.said
        self.answer = first.answer

    def go_on(self, folder: Path, victim: int, moment: float | None) -> tuple[Ended, Ended, float]:
        """Start or resume; how the one that is killed at ``moment`` ended, how the other did, and how much later."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        together = self.world.folder / "together"
        together.unlink(missing_ok=True)
        work = [partial(self._work, rank, port, folder, together if rank == victim else None) for rank in range(2)]
        children = [Child(each) for each in work]
        killed = children[victim].wait(kill_after=moment, begun=None if moment is None else together)
        began = time.monotonic()
        other = children[1 - victim].wait()
        return killed, other, time.monotonic() - began

    def _work(self, rank: int, port: int, folder: Path, together: Path | None) -> object:
        """One of the two processes."""
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "localhost", **{name: str(number) for name, number in numbers.items()}}
        self.world.cached_in(self.cache)
        with open_processes() as processes:
            if together is not None:
                together.touch()
            if not processes.first(lambda: is_whole(folder)):
                resume = processes.first(lambda: RunFolder(folder).has_state)
                given = Preloaded(processes=processes)
                train_recipe(self.recipe, folder, say=lambda line: None, resume=resume, preloaded=given)
        return run_answer(folder) if rank == 0 else None
