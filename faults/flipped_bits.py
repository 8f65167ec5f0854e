"""One bit flipped in each kind of file that clasp writes: noticed, or without effect on any answer.

Input: the world, a number of flips. Output: a ``CaseCount``. Note: noticed is a ``UserError`` or a warning that is
logged; without effect is an answer equal to that of the whole files: embeddings, results and recipe of a run, the
weights at the end of a resumed one or of one on cached features, the hits of a search.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clasp.commands.search import index_images, open_index
from clasp.config.build import load
from clasp.report.run_record import read_results
from clasp.training.run_folder import RunFolder
from faults.child import Ended, run_in_child
from faults.counts import CaseCount
from faults.world import World, copy_tree, run_answer
from toydata import toys
from toyruns import run

_QUERIES = ("a red circle", "blue", "a photo of a green ring", "square")
_NOTICED, _HARMLESS, _SILENT = "noticed", "without effect on any answer", "**silent**"


class _Kind(NamedTuple):
    """Files of one kind inside of a folder, and the answer that is computed from the folder."""

    name: str
    folder: Path
    files: Sequence[str]
    answer: Callable[[Path], Any]


def flipped_bits(world: World, trials: int = 200) -> CaseCount:
    """Flips, evenly over the kinds of files of clasp's own."""
    return _flip(
        world,
        _own_kinds(world),
        trials,
        "one bit flipped in a file of a run, its state, the caches or the index",
        "noticed, or without effect on any answer",
    )


def flipped_bits_edge(world: World, trials: int = 50) -> CaseCount:
    """Flips in the files of qdrant-edge, which has no checksums: what is silent is counted, not promised away."""
    indexed = _indexed(world, "edge")
    kind = _Kind("edge", indexed, ("index-edge/shard-*/**/*",), search_answer)
    row = _flip(world, [kind], trials, "one bit flipped in a file of qdrant-edge", "none: they have no checksums")
    return CaseCount(row.fault, row.promise, "bits-edge", row.tried, row.outcomes)


def _own_kinds(world: World) -> list[_Kind]:
    whole, indexed, stopped = world.finished, _indexed(world, "flat"), _stopped(world)
    kinds = [
        _Kind(name, whole, (pattern,), lambda folder: _model(world, folder))
        for name, pattern in {
            "recipe": "recipe.toml",
            "bases": "base.json",
            "transform": "transform.json",
            "tokenizer": "tokenizer/*",
            "delta": "delta.safetensors",
            "results": "results.jsonl",
        }.items()
    ]
    kinds.append(_Kind("state", stopped, ("state/*",), lambda folder: _resume(world, folder)))
    for name, pattern in {
        "cached features": "**/*.npy",
        "facts of features": "**/*.json",
        "index of pairs": "**/*.arrow",
    }.items():
        kinds.append(_Kind(name, world.folder / "cache", (pattern,), lambda folder: _train(world, folder)))
    for name, pattern in {
        "vectors": "index/vectors*",
        "rows": "index/rows*",
        "manifest": "index/manifest.json",
    }.items():
        kinds.append(_Kind(name, indexed, (pattern,), search_answer))
    kinds.append(_Kind("background", indexed, ("background.safetensors",), search_answer))
    return kinds


def _flip(world: World, kinds: Sequence[_Kind], trials: int, fault: str, promise: str) -> CaseCount:
    chance, outcomes, failures = world.chance(fault), Counter[str](), []
    wanted = {}
    for kind in kinds:
        copy_tree(kind.folder, world.folder / "flipped")  # answers may hold paths: all are of the same folder
        ended = run_in_child(lambda kind=kind: kind.answer(world.folder / "flipped"))
        assert ended.code == 0 and "WARNING" not in ended.said, f"{kind.name}: {ended.said}"
        wanted[kind.name] = ended.answer
    for number in range(trials):
        kind = kinds[number % len(kinds)]
        folder = world.folder / "flipped"
        copy_tree(kind.folder, folder)
        files = sorted(file for pattern in kind.files for file in folder.glob(pattern) if _holds_data(file))
        assert files, kind.name
        file = chance.choice(files)
        place = _data_bytes(file, chance.random())
        bit = chance.randrange(8)
        with file.open("r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ 1 << bit]))
        ended = run_in_child(lambda kind=kind, folder=folder: kind.answer(folder))
        outcome = _outcome(ended, wanted[kind.name])
        outcomes[outcome] += 1
        if outcome not in (_NOTICED, _HARMLESS):
            where = f"{file.relative_to(folder)} byte {place} bit {bit}"
            failures.append(f"{kind.name}: {where}: {outcome}: {ended.describe()}")
    shutil.rmtree(world.folder / "flipped", ignore_errors=True)
    return CaseCount(fault, promise, "bits", trials, dict(outcomes), tuple(failures))


def _outcome(ended: Ended, wanted: Any) -> str:
    if ended.is_refusal or (ended.code == 0 and "WARNING" in ended.said):
        return _NOTICED
    if ended.code == 0:
        return _HARMLESS if ended.answer == wanted else _SILENT
    return "a hang" if ended.hung else "a traceback" if ended.code > 0 else f"died of signal {-ended.code}"


def _holds_data(file: Path) -> bool:
    return file.is_file() and file.stat().st_blocks > 0 and file.stat().st_size > 0 and file.name != "lock"


def _data_bytes(file: Path, share: float) -> int:
    """A place in the file that is no hole; ``share`` in [0, 1)."""
    extents, end, size = [], 0, file.stat().st_size
    with file.open("rb") as opened:
        while end < size:
            try:
                start = os.lseek(opened.fileno(), end, os.SEEK_DATA)
            except OSError:  # only holes are left
                break
            end = os.lseek(opened.fileno(), start, os.SEEK_HOLE)
            extents.append((start, end))
    left = int(share * sum(end - start for start, end in extents))
    for start, end in extents:
        if left < end - start:
            return start + left
        left -= end - start
    raise AssertionError(file)


# --- the answers -----------------------------------------------------------------------------------------------------


def _model(world: World, folder: Path) -> Any:
    """Embeddings, results and recipe of a run."""
    model = load(folder)
    images = model.encode_image([toy.png for toy in toys(4, seed=9)]).numpy().tobytes()
    return images, model.encode_text(list(_QUERIES)).numpy().tobytes(), read_results(folder), RunFolder(folder).recipe()


def _resume(world: World, folder: Path) -> Any:
    """What a run ends with that goes on from its state."""
    world.cached_in("cache")
    run(world.recipe(), folder, resume=True)
    return run_answer(folder)


def _train(world: World, folder: Path) -> Any:
    """What a run ends with that uses the cache in ``folder``."""
    os.environ["CLASP_CACHE"] = str(folder)
    target = folder.with_name("on-flipped-cache")
    shutil.rmtree(target, ignore_errors=True)
    run(world.recipe(), target)
    return run_answer(target)


def search_answer(folder: Path) -> Any:
    """Hits with scores, calibrated scores and metadata."""
    with open_index(folder) as (engine, background):
        texts = engine.model.encode_text(list(_QUERIES))
        hits = engine.store.search(texts, 10)
        images = [engine.stored_vectors([hit.id for hit in found]) for found in hits]
        z = [background.z_scores(texts, of) for of in images]
        return [[(hit.id, hit.score, dict(hit.meta)) for hit in found] for found in hits], z, background.threshold


def _indexed(world: World, engine: str) -> Path:
    """A run with an index of 60 drawings."""
    folder, pictures = world.folder / f"indexed-{engine}", world.pictures(f"few-{engine}", 60)
    copy_tree(world.finished, folder)
    ended = run_in_child(lambda: index_images(folder, str(pictures), store=engine) and None)
    assert ended.code == 0, ended.said
    return folder


def _stopped(world: World) -> Path:
    """A run that was killed after some steps."""
    folder = world.folder / "stopped"

    def train() -> None:
        world.cached_in("cache")
        run(world.recipe(), folder)

    seconds = 0.3
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        ended = run_in_child(train, kill_after=seconds)
        if ended.was_killed and len(list((folder / "state").glob("*.safetensors"))) == 2:
            return folder
        seconds = 0.3 if ended.code == 0 else seconds + 0.05
