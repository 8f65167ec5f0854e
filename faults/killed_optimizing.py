"""``kill -9`` while a store of the engine edge that has an HNSW index is written to, and while the index is built anew.

Input: the world, a number of kills. Output: a ``CaseCount``. Note: the vectors are so wide that few of them are above
the size from which qdrant-edge builds an index, and the store of the first trial is closed, hence indexed. A step adds,
replaces and deletes entries; closing the store builds the index.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import Float

from clasp.search.edge_store import EdgeStore
from faults.child import Ended, run_in_child
from faults.counts import CaseCount
from faults.world import World, copy_tree

_ENTRIES, _WIDTH = 3000, 2000  # 24 MB of vectors; qdrant-edge indexes from 20 MB on
_STEPS, _OF_STEP = 8, 40
_TOLERANCE = 1e-6  # the engine normalises again

_Versions = dict[str, int]
"""Which vector each id has"""


def killed_optimizing(world: World, trials: int = 20) -> CaseCount:
    """Kills at random moments between the opening of the store and the end of its closing."""
    chance, outcomes, failures = world.chance("optimizing"), Counter[str](), []
    begun, folder, steps = world.folder / "optimized", world.folder / "optimizing", world.folder / "steps"
    ended = run_in_child(lambda: _make(begun))
    assert ended.code == 0, ended.said
    copy_tree(begun, folder)
    began = time.monotonic()
    _require_whole(run_in_child(lambda: _write(folder, steps)))
    seconds, killed, attempt = time.monotonic() - began, 0, 0
    while killed < trials and attempt < 3 * trials:
        attempt += 1
        copy_tree(begun, folder)
        steps.unlink(missing_ok=True)
        moment = chance.uniform(0, seconds)
        if not run_in_child(lambda: _write(folder, steps), kill_after=moment).was_killed:
            continue
        killed += 1
        done = len(steps.read_text().splitlines()) if steps.exists() else 0
        left = run_in_child(lambda done=done: _problem(folder, done))
        problem = left.answer if left.code == 0 else left.describe()
        if not problem:
            after = run_in_child(lambda: _write(folder, steps))
            problem = after.answer if after.code == 0 else f"going on: {after.describe()}"
        if problem:
            failures.append(f"kill {killed} after {moment:.3f} s: {problem}")
        where = "while the index was built" if done == _STEPS else "midway" if done else "before the first step"
        outcomes["lost" if problem else where] += 1
    return CaseCount(
        "`kill -9` while an index of the engine edge with HNSW is written to, or its HNSW built anew",
        "what was acknowledged is stored, once; the same writes go on to the same store",
        "optimizing-edge",
        killed,
        dict(outcomes),
        tuple(failures),
    )


def _make(folder: Path) -> None:
    """A store of ``_ENTRIES`` entries, closed, so that it has its index."""
    store = EdgeStore(folder)
    names = list(_after(0))
    store.add(names, _vectors(dict.fromkeys(names, 0)), [{}] * len(names))
    store.close()


def _write(folder: Path, steps: Path) -> str:
    """All steps, each acknowledged by a line in a file, then the index; returns what is wrong with the store."""
    store = EdgeStore(folder)
    for number in range(_STEPS):
        before, after = _after(number), _after(number + 1)
        changed = {name: version for name, version in after.items() if before.get(name) != version}
        store.add(list(changed), _vectors(changed), [{}] * len(changed))
        store.delete(before.keys() - after.keys())
        with steps.open("a") as file:
            file.write("done\n")
    store.close()
    return _problem(folder, _STEPS)


def _after(steps: int) -> _Versions:
    """The entries after some steps."""
    found = {f"old-{number}": 0 for number in range(_ENTRIES)}
    for step in range(steps):
        places = range(step * _OF_STEP, (step + 1) * _OF_STEP)
        found |= {f"new-{place}": 0 for place in places} | {f"old-{place}": 1 for place in places}
        for place in places:
            del found[f"old-{_ENTRIES - 1 - place}"]
    return found


def _vectors(versions: _Versions) -> Float[np.ndarray, "n E"]:
    """The unit vector of each id in its version."""
    rows = [
        np.random.default_rng([version, *name.encode()]).standard_normal(_WIDTH, np.float32)
        for name, version in versions.items()
    ]
    return np.stack([row / np.linalg.norm(row) for row in rows])


def _problem(folder: Path, done: int) -> str:
    """What is wrong with a store in which ``done`` steps are acknowledged, and the next is perhaps there in part."""
    store = EdgeStore(folder)
    try:
        names = [name for name, _ in store.scan()]
        vectors = dict(zip(names, store.vectors(names), strict=True))
        if len(names) != len(set(names)) or len(names) != store.count():
            return "an id is stored twice"
        hits = store.search(np.stack([vectors[name] for name in names[:3]]), 1)
        if [found[0].id for found in hits] != names[:3]:
            return "an entry is not the nearest to itself"
    finally:
        store.close()
    known = _after(done), _after(min(done + 1, _STEPS))
    lost = sorted((known[0].keys() & known[1].keys()) - vectors.keys())
    if lost:
        return f"{len(lost)} entries are gone, such as {lost[0]}"
    wrong = set(vectors)
    for versions in known:
        names = sorted(wrong & versions.keys())
        if names:
            written = _vectors({name: versions[name] for name in names})
            near = np.abs(written - np.stack([vectors[name] for name in names])).max(axis=1) <= _TOLERANCE
            wrong -= {name for name, each in zip(names, near, strict=True) if each}
    if not wrong:
        return ""
    return f"{len(wrong)} entries have a vector that was never written, or are deleted, such as {min(wrong)}"


def _require_whole(ended: Ended) -> None:
    assert ended.code == 0 and not ended.answer, ended.answer or ended.said
