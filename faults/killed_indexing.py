"""``kill -9`` at random moments of indexing and of deleting: nothing acknowledged is lost, nothing is there twice.

Input: the world, an engine of the store, a number of kills. Output: a ``CaseCount``. A trial is killed once, the store
is looked at as it was left, and then the same command is run to its end. "Deleting" begins with an index of a folder of
which a third of the files is gone, a third is new, and some have changed.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clasp.commands.run_store import open_run_store
from clasp.commands.search import index_images
from clasp.types import ProgressCallback
from faults.child import run_in_child
from faults.counts import CaseCount
from faults.world import World, copy_tree
from toydata import toys, write_images

PICTURES = 400
_TOLERANCE = 1e-6  # an engine normalises vectors that are normalised


class _Trial(NamedTuple):
    """A copy of a run, the pictures to index into it, and the vectors that they must get."""

    run: Path
    pictures: Path
    engine: str
    wanted: dict[str, Any]

    def index(self, acknowledged: Path) -> dict[str, Any]:
        """Index; the time, and how many images are acknowledged, are written down after each batch."""

        @contextmanager
        def bar(title: str) -> Iterator[ProgressCallback]:
            with acknowledged.open("ab", buffering=0) as file:
                yield lambda done, total: file.write(f"{time.monotonic()} {done}\n".encode()) and None

        index_images(self.run, str(self.pictures), bar=bar, store=self.engine)
        return self.entries()

    def entries(self) -> dict[str, Any]:
        """The vectors of the store by id. Raises where an id is there twice, or another image is under it."""
        store = open_run_store(self.run)
        try:
            ids = [name for name, _ in store.scan()]
            assert len(ids) == len(set(ids)) == store.count(), "an id is stored twice"
            for name, meta in zip(ids, store.metadata(ids), strict=True):
                assert meta["name"] == str(self.pictures / name), (name, meta["name"])
            return dict(zip(ids, store.vectors(ids), strict=True))
        finally:
            store.close()


def killed_indexing(world: World, engine: str, trials: int = 50) -> CaseCount:
    """An index from nothing, killed once in each trial."""
    pictures = world.pictures(f"pictures-{engine}", PICTURES)
    return _count(
        world,
        _Plan(engine, "indexing", world.finished, pictures, trials),
        f"`kill -9` at a random moment of `clasp index`, engine {engine}",
        "what was acknowledged is stored, once; the same command goes on to the same index",
    )


def killed_deleting(world: World, engine: str, trials: int = 50) -> CaseCount:
    """An index that follows a folder that has changed, killed once in each trial."""
    pictures, begun = world.pictures(f"changing-{engine}", PICTURES), world.folder / f"begun-{engine}"
    copy_tree(world.finished, begun)
    ended = run_in_child(lambda: _Trial(begun, pictures, engine, {}).index(begun / "acknowledged"))
    assert ended.code == 0, ended.said
    names = sorted(path.name for path in pictures.iterdir())
    for name in names[::3]:
        (pictures / name).unlink()
    for name, toy in zip(names[1::9], toys(PICTURES, seed=3), strict=False):
        (pictures / name).write_bytes(toy.png)
    write_images(toys(PICTURES // 3, seed=2), pictures.parent)
    return _count(
        world,
        _Plan(engine, "deleting", begun, pictures, trials),
        f"`kill -9` while `clasp index` deletes, replaces and adds, engine {engine}",
        "no entry is lost, doubled or of another image; the same command goes on to the same index",
    )


class _Plan(NamedTuple):
    engine: str
    what: str
    begun: Path
    pictures: Path
    kills: int


def _count(world: World, plan: _Plan, fault: str, promise: str) -> CaseCount:
    chance, outcomes, failures = world.chance(f"{plan.what} {plan.engine}"), Counter[str](), []
    before, folder = {}, world.folder / f"{plan.what}-{plan.engine}"
    trial = _Trial(folder, plan.pictures, plan.engine, {})
    if plan.what == "deleting":
        before = _require(run_in_child(_Trial(plan.begun, plan.pictures, plan.engine, {}).entries).answer)
    copy_tree(plan.begun, folder)
    acknowledged = world.folder / "acknowledged"
    began = time.monotonic()
    whole = run_in_child(lambda: trial.index(acknowledged))
    seconds = time.monotonic() - began
    wanted, killed, attempt = _require(whole.answer, whole.said), 0, 0
    times = [float(line.split()[0]) for line in acknowledged.read_text().splitlines()]
    while killed < plan.kills and attempt < 3 * plan.kills:
        attempt += 1
        copy_tree(plan.begun, folder)
        acknowledged.unlink(missing_ok=True)
        # half of the kills at any moment, half between the first and the last batch
        within = attempt % 2 == 0
        moment = chance.uniform(0, times[-1] - times[0] if within else seconds)
        ended = run_in_child(
            lambda: trial.index(acknowledged), kill_after=moment, begun=acknowledged if within else None
        )
        if not ended.was_killed:
            continue
        killed += 1
        left = run_in_child(_left(trial))
        after = run_in_child(lambda: trial.index(world.folder / "acknowledged-after"))
        problem = _problem(left.answer, before, wanted, _last(acknowledged)) if left.code == 0 else left.describe()
        if not problem and (after.code or not _same(after.answer, wanted)):
            problem = f"other entries after going on: {after.describe()}"
        if problem:
            failures.append(f"kill {killed} after {moment:.3f} s: {problem}")
        held = len((left.answer or {}).keys() & wanted.keys())
        state = "before the first batch" if held == len(before.keys() & wanted.keys()) else "midway"
        outcomes["lost" if problem else "whole already" if held == len(wanted) else state] += 1
    shutil.rmtree(folder, ignore_errors=True)
    case = f"{plan.what}-{plan.engine}"
    return CaseCount(fault, promise, case, killed, dict(outcomes), tuple(failures))


def _left(trial: _Trial) -> Callable[[], dict[str, Any]]:
    """The entries as a kill left them; none where no index was begun."""
    return lambda: trial.entries() if any(trial.run.glob("index*/manifest.json")) else {}


def _problem(found: dict[str, Any], before: dict[str, Any], wanted: dict[str, Any], acknowledged: int) -> str:
    """What is wrong with the entries of a killed index; empty if nothing is."""
    for name, vector in found.items():
        if not any(_near(vector, known[name]) for known in (before, wanted) if name in known):
            return f"{name} has a vector of another image"
    lost = sorted((before.keys() & wanted.keys()) - found.keys())
    if lost:
        return f"{len(lost)} entries that should stay are gone, such as {lost[0]}"
    present = len(found.keys() & wanted.keys())
    return f"{acknowledged} acknowledged, {present} there" if present < acknowledged else ""


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(_near(found[name], wanted[name]) for name in wanted)


def _near(one: Any, other: Any) -> bool:
    return bool((torch.from_numpy(one) - torch.from_numpy(other)).abs().max() <= _TOLERANCE)


def _last(acknowledged: Path) -> int:
    """The last number that was written down."""
    lines = acknowledged.read_text().splitlines() if acknowledged.exists() else []
    return int(lines[-1].split()[1]) if lines else 0


def _require(answer: Any, said: str = "") -> Any:
    assert answer is not None, said
    return answer
