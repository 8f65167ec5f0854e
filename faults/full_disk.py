"""A disk that fills up while a run is trained or an index written, and one that cannot be written to.

Input: the world. Output: ``CaseCount``s. Note: the disk is a small tmpfs in a user and mount namespace of the child's
own, which needs no rights; where a namespace is refused, the outcome is named as that. After the refusal the disk is
made larger, and the same command goes on.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clasp import cli
from clasp.commands.search import index_images
from clasp.training.run_folder import RunFolder
from clasp.types import UserError
from faults.child import run_in_child
from faults.counts import CaseCount
from faults.flipped_bits import search_answer
from faults.world import World, run_answer
from toyruns import run

_NEW_USER, _NEW_MOUNTS, _READ_ONLY, _REMOUNT = 0x10000000, 0x00020000, 1, 32
_PLENTY = 512 << 20
_NO_NAMESPACE = "not tried: no namespaces here"
_READ_ONLY_COMMANDS = (
    ("train", "{toml}", "--name", "new", "--runs", "{disk}"),
    ("train", "{toml}", "--name", "run", "--runs", "{disk}"),
    ("resume", "{disk}/run"),
    ("index", "{disk}/run", "{pictures}"),
    ("search", "{disk}/run", "a red circle"),
    ("eval", "{disk}/run", "retrieval", "data={pairs}"),
    ("report", "{disk}/run"),
    ("export", "{disk}/run", "--to", "hub", "--out", "{disk}/hub"),
    ("doctor", "{toml}"),
    ("params", "{toml}"),
)


def full_disk(world: World, trials: int = 20) -> CaseCount:
    """Trials in turn: training, training with the cache on the small disk, indexing."""
    chance, outcomes, failures = world.chance("full disk"), Counter[str](), []
    pictures = world.pictures("disk-pictures", 120)
    wanted = {
        what: _answer(world, lambda what=what: _attempts(world, pictures)[what](world.folder / what)) for what in _KINDS
    }
    for number in range(trials):
        what = _KINDS[number % len(_KINDS)]
        size = 4096 * chance.randint(2, {"training": 30, "caching": 16, "indexing": 30}[what])
        ended = run_in_child(lambda what=what, size=size: _fill(world, pictures, what, size))
        if ended.code == 0 and ended.answer[0] == _NO_NAMESPACE:
            outcomes[_NO_NAMESPACE] += 1
            continue
        told = ended.answer[0] if ended.code == 0 else ended.describe()
        if ended.code or ended.answer[1] != wanted[what] or (told and "space" not in told):
            failures.append(f"{what} on {size} bytes: {told}")
            outcomes["broken"] += 1
        else:
            outcomes["refused in one line, then went on to the same" if told else "had room"] += 1
    return CaseCount(
        "a disk that fills up in training, caching or indexing",
        "one line; what was saved stays, and with room again the same command ends with the same",
        "full-disk",
        trials,
        dict(outcomes),
        tuple(failures),
    )


_KINDS = ("training", "caching", "indexing")


def _attempts(world: World, pictures: Path) -> dict[str, Callable[[Path], Any]]:
    def train(disk: Path) -> Any:
        folder = disk / "run"
        if not (folder / "delta.safetensors").exists() or RunFolder(folder).has_state:
            run(world.recipe(), folder, resume=RunFolder(folder).has_state)
        return run_answer(folder)

    def train_in(cache: str) -> Callable[[Path], Any]:
        def work(disk: Path) -> Any:
            os.environ["CLASP_CACHE"] = str(world.folder / "cache" if cache == "whole" else disk / "cache")
            return train(world.folder / f"beside-{os.getpid()}" if cache == "small" else disk)

        return work

    def index(disk: Path) -> Any:
        world.cached_in("cache")
        folder = disk / "run"
        if not (folder / "delta.safetensors").exists():
            shutil.copytree(world.finished, folder, dirs_exist_ok=True)
        index_images(folder, str(pictures), store="flat")
        return search_answer(folder)

    return {"training": train_in("whole"), "caching": train_in("small"), "indexing": index}


def _answer(world: World, work: Callable[[], Any]) -> Any:
    ended = run_in_child(work)
    assert ended.code == 0, ended.said
    return ended.answer


def _fill(world: World, pictures: Path, what: str, size: int) -> tuple[str, Any]:
    """What was said on the small disk, and the answer after it was made larger."""
    disk, attempt = world.folder / "disk", _attempts(world, pictures)[what]
    if not _mount(disk, size if what != "indexing" else _PLENTY):
        return _NO_NAMESPACE, None
    if what == "indexing":  # the run has room, the index may not
        shutil.copytree(world.finished, disk / "run")
        used = os.statvfs(disk)
        _resize(disk, (used.f_blocks - used.f_bfree) * used.f_frsize + size)
    told = ""
    try:
        attempt(disk)
    except UserError as error:
        told = str(error)
    _resize(disk, _PLENTY)
    return told, attempt(disk)


def read_only(world: World, trials: int = len(_READ_ONLY_COMMANDS)) -> CaseCount:
    """Each command once on a folder that cannot be written to; a usage error, which names --help, is no answer."""
    outcomes, failures = Counter[str](), []
    pictures, toml = world.pictures("few-pictures", 20), world.folder / "toy.toml"
    toml.write_text(world.recipe().to_toml(), encoding="utf-8")
    places = {"toml": toml, "pictures": pictures, "pairs": world.pairs}
    for command in _READ_ONLY_COMMANDS[:trials]:
        ended = run_in_child(lambda command=command: _on_read_only(world, command, places))
        if ended.code == 0 and ended.answer is None:
            outcomes[_NO_NAMESPACE] += 1
        elif ended.code or ended.answer not in (0, 2) or "Traceback" in ended.said or "--help" in ended.said:
            failures.append(f"clasp {' '.join(command)}: {ended.answer} {ended.describe()}")
            outcomes["broken"] += 1
        else:
            outcomes["did its work" if ended.answer == 0 else "refused in one line"] += 1
    promise = "reading commands work, others refuse in one line; no traceback"
    tried = len(_READ_ONLY_COMMANDS[:trials])
    return CaseCount("a folder that cannot be written to", promise, "read-only", tried, dict(outcomes), tuple(failures))


def _on_read_only(world: World, command: tuple[str, ...], places: dict[str, Path]) -> int | None:
    disk = world.folder / "disk"
    if not _mount(disk, _PLENTY):
        return None
    world.cached_in("cache")
    shutil.copytree(world.finished, disk / "run")
    if command[0] == "search":
        index_images(disk / "run", str(places["pictures"]), store="flat")
    _resize(disk, _PLENTY, _READ_ONLY)
    os.chdir(world.folder)
    sys.argv = ["clasp", *(part.format(disk=disk, **places) for part in command)]
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    return 0


# --- the disk --------------------------------------------------------------------------------------------------------


def _mount(disk: Path, size: int) -> bool:
    """Mount a tmpfs of ``size`` bytes that only this process sees; whether that is possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_MOUNTS):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    disk.mkdir(exist_ok=True)
    return libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, f"size={size}".encode()) == 0


def _resize(disk: Path, size: int, flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", _REMOUNT | flags, f"size={size}".encode())
    assert not failed, os.strerror(ctypes.get_errno())
