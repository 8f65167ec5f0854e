"""Data that changes under the reader, numbers that are not finite, a clock that goes back, a process that is killed.

Input: the world. Output: ``CaseCount``s.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clasp.commands.search import index_images
from clasp.data.pairs import Pairs, open_pairs
from clasp.types import UserError
from faults.child import run_in_child
from faults.counts import CaseCount
from faults.flipped_bits import search_answer
from faults.world import ADAPTED, World, run_answer
from toydata import WRITERS, toys
from toyruns import lines, recipe, run

_SHARDS = ("tar", "parquet struct", "parquet", "folder", "jsonl")
_PROCESS_TESTS = ("tests/commands/test_processes.py",)


def changed_shards(world: World, trials: int = 100) -> CaseCount:
    """A shard or image that is truncated, rewritten in place, replaced or deleted between two reads of its pairs."""
    chance, outcomes, failures = world.chance("shards"), Counter[str](), []
    for number in range(trials):
        format = _SHARDS[number % len(_SHARDS)]
        seed = chance.random()
        ended = run_in_child(lambda format=format, seed=seed: _change(world, format, random.Random(seed)))
        if ended.code:
            failures.append(f"{format} {seed}: {ended.describe()}")
            outcomes["broken"] += 1
            continue
        refused, other = ended.answer
        outcomes["every image as it was" if not refused else "named as changed, missing or truncated"] += 1
        if other:
            failures.append(f"{format} {seed}: {other} images read as another's bytes")
    return CaseCount(
        "a shard or image truncated, rewritten, replaced or deleted while it is read",
        "an image is as it was when its pairs were opened, or named; never another's bytes",
        "shards",
        trials,
        dict(outcomes),
        tuple(failures),
    )


def _change(world: World, format: str, chance: random.Random) -> tuple[int, int]:
    """Images that are refused, and that are silently others."""
    folder = world.folder / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    source = WRITERS[format](toys(40, seed=1), folder / "a")
    other = WRITERS[format](toys(40, seed=2), folder / "b")
    pairs = open_pairs(source)
    before = [pair.image.read() for pair in pairs]
    files = sorted(path for path in (folder / "a").rglob("*") if path.suffix in (".tar", ".parquet", ".png"))
    shards = [file for file in files if file.suffix != ".png"]
    in_shards = format in ("tar", "parquet struct")
    changed = shards if in_shards else [file for file in files if file.suffix == ".png"]
    others = sorted(Path(other).parent.rglob("*.png")) if not in_shards else [Path(other)]
    allowed = set()
    for file in chance.sample(changed, min(len(changed), chance.randint(1, 5))):
        allowed |= _disturb(file, chance.choice(others), chance)
    if chance.random() < 0.5:
        pairs = pairs[:] if chance.random() < 0.5 else pairs.subset(range(len(pairs)))
    return _read_again(pairs, before, allowed)


def _disturb(file: Path, other: Path, chance: random.Random) -> set[bytes]:
    """Change a file; returns what may be read of it: a picture that is a file of its own is what it is now."""
    data = other.read_bytes()
    way = chance.randrange(4)
    if way == 0:
        with file.open("r+b") as opened:
            opened.truncate(chance.randrange(file.stat().st_size))
    elif way == 1:
        file.write_bytes(data)
    elif way == 2:
        part = file.with_name("new")
        part.write_bytes(data)
        os.replace(part, file)
    else:
        file.unlink()
    return {file.read_bytes()} if file.suffix == ".png" and file.exists() else set()


def _read_again(pairs: Pairs, before: list[bytes], allowed: set[bytes]) -> tuple[int, int]:
    refused = other = 0
    for number, data in enumerate(before):
        try:
            found = pairs[number].image.read()  # captions too are read again
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        other += found != data and found not in allowed
    return refused, other


def numbers_not_finite(world: World, trials: int = 10) -> CaseCount:
    """Pictures of floating-point numbers that are NaN or infinite among those of a run, live and cached."""
    chance, outcomes, failures = world.chance("nan"), Counter[str](), []
    for number in range(trials):
        folder = world.folder / "nan"
        shutil.rmtree(folder, ignore_errors=True)
        pairs = Path(WRITERS["csv"](toys(96), folder / "pairs"))
        for file in chance.sample(sorted(pairs.parent.rglob("*.png")), 2):
            values = np.full((32, 32), chance.choice((np.nan, np.inf, -np.inf, 1e38)), np.float32)
            made = io.BytesIO()
            Image.fromarray(values).save(made, "TIFF")
            file.write_bytes(made.getvalue())
        ended = run_in_child(lambda number=number, pairs=pairs: _train_on(world, pairs, ADAPTED if number % 2 else ()))
        if ended.code or not ended.answer:
            failures.append(f"trial {number}: {ended.describe()}")
        outcomes["broken" if ended.code or not ended.answer else "every loss, weight and result finite"] += 1
    return CaseCount(
        "images whose pixels are NaN or infinite",
        "read as finite pixels, or skipped and named; a step whose loss is not finite is not taken "
        "(`tests/training/test_loop.py`)",
        "nan",
        trials,
        dict(outcomes),
        tuple(failures),
    )


def _train_on(world: World, pairs: Path, overrides: tuple[str, ...]) -> bool:
    os.environ["CLASP_CACHE"] = str(pairs.parent / "cache")
    target = pairs.parent / "run"
    run(recipe(world.towers, pairs, "train.epochs=2", "data.max_bad_fraction=0.1", *overrides), target)
    losses = [row["loss"] for row in lines(target / "log.jsonl") if row["event"] == "step"]
    return bool(losses) and all(np.isfinite(losses))


def clock_goes_back(world: World, trials: int = 10) -> CaseCount:
    """The system's clock jumps back by an hour in training; files whose times go back are indexed again."""
    chance, outcomes, failures = world.chance("clock"), Counter[str](), []
    wanted = run_in_child(lambda: _train_with_clock(world, 1 << 62)).answer
    assert wanted is not None
    for number in range(trials):
        if number % 2:
            seed = chance.random()
            ended = run_in_child(lambda seed=seed: _index_with_old_times(world, random.Random(seed)))
            held = ended.code == 0 and ended.answer
        else:
            moment = chance.randrange(1, 200)
            ended = run_in_child(lambda moment=moment: _train_with_clock(world, moment))
            held = ended.code == 0 and ended.answer == wanted
        if not held:
            failures.append(f"trial {number}: {ended.describe()}")
        outcomes[("indexed as it is now" if number % 2 else "trained to the same weights") if held else "broken"] += 1
    return CaseCount(
        "the clock goes back by an hour in training; changed files get earlier times",
        "bitwise the same weights and results; the changed files are read again",
        "clock",
        trials,
        dict(outcomes),
        tuple(failures),
    )


def _train_with_clock(world: World, moment: int) -> Any:
    """Train; from call ``moment`` of the clock on it is an hour earlier."""
    now, now_ns, calls = time.time, time.time_ns, iter(range(1 << 62))
    time.time = lambda: now() - 3600 * (next(calls) >= moment)
    time.time_ns = lambda: now_ns() - 3600 * 10**9 * (next(calls) >= moment)
    world.cached_in("cache")
    folder = world.folder / f"clock-{os.getpid()}"
    run(world.recipe(), folder)
    return run_answer(folder)


def _index_with_old_times(world: World, chance: random.Random) -> bool:
    pictures, folder = world.pictures(f"old-{os.getpid()}", 40), world.folder / f"old-run-{os.getpid()}"
    shutil.copytree(world.finished, folder)
    index_images(folder, str(pictures), store="flat")
    for file, toy in zip(chance.sample(sorted(pictures.iterdir()), 5), toys(5, seed=7), strict=True):
        file.write_bytes(toy.png)
        os.utime(file, (1e9 + chance.randrange(1000), 1e9 + chance.randrange(1000)))
    index_images(folder, str(pictures), store="flat")
    fresh = folder.with_name(f"fresh-{os.getpid()}")
    shutil.copytree(world.finished, fresh)
    index_images(fresh, str(pictures), store="flat")
    return [[hit[:2] for hit in hits] for hits in search_answer(folder)[0]] == [
        [hit[:2] for hit in hits] for hits in search_answer(fresh)[0]
    ]


def killed_process(world: World, trials: int = 1) -> CaseCount:
    """The tests of several processes, of which one is killed or gets a signal."""
    command = (sys.executable, "-m", "pytest", "-m", "faults or not faults", "-p", "no:cacheprovider", *_PROCESS_TESTS)
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900, env={**os.environ})
    counts = Counter[str]()
    for word in done.stdout.replace(",", "").split("\n")[-2:]:
        parts = word.split()
        counts += Counter({name: int(count) for count, name in pairwise(parts) if count.isdigit()})
    outcomes = Counter({name: counts[name] for name in ("passed", "failed") if counts[name]})
    failures = () if done.returncode == 0 else (" ".join(done.stdout.split())[-300:],)
    promise = "the others end within seconds, with a line; the run goes on, on one process too, to the same weights"
    return CaseCount(
        "one of two processes is killed, or gets a signal",
        promise,
        "processes",
        outcomes.total(),
        dict(outcomes),
        failures,
    )


CASES: dict[str, tuple[Callable[..., CaseCount], int]] = {
    "shards": (changed_shards, 100),
    "nan": (numbers_not_finite, 10),
    "clock": (clock_goes_back, 10),
    "processes": (killed_process, 1),
}
"""A case by name, with its number of trials"""
