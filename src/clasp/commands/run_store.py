"""Which store holds the index of a run: recorded in ``RUN/store.json``, or else the flat one in ``RUN/index``.

Input: a run folder. Output: an open ``UpdatableStore``. Note: the file is replaced atomically, so that a run always has
one index; it is written again after a remote index was changed, since that has no file whose time a server could read.
As a recipe, it is imported from only with ``--allow-code``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clasp.errors import counted
from clasp.plain_types import MessageCallback, UserError
from clasp.search.engine import UpdatableStore
from clasp.search.flat_store import FlatStore
from clasp.search.manifest import lock_store
from clasp.search.store_registry import (
    FLAT_ENTRIES,
    check_store_name,
    is_address,
    is_outside,
    open_store,
    store_folder,
    suggest_store,
)
from clasp.training.run_code import allow_code, require_allowed

STORE_FILE = "store.json"
_allowed = set[tuple[Path, str]]()
"""Records whose code was allowed once, since the threads of a server are outside of the block that allows it"""


def recorded_store(run: Path) -> str | None:
    """The engine of the run's index; ``None`` if it has no index. ``UserError`` for a damaged record, and for one that
    names code which was not allowed."""
    path = run / STORE_FILE
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["store"]
        check_store_name(name)
        if is_outside(name) and (path, name) not in _allowed:
            require_allowed({"store": name}, path)
            _allowed.add((path, name))
        return name
    except FileNotFoundError:
        return "flat" if store_folder(run, "flat").is_dir() else None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{path} is damaged: it should be {{"store": "edge"}} or another engine') from None


def record_store(run: Path, name: str) -> None:
    """Make this engine the one of the run's index."""
    path = run / STORE_FILE
    if name == "flat":
        path.unlink(missing_ok=True)
        return
    part = path.with_name(f"{STORE_FILE}.part")
    part.write_text(json.dumps({"store": name}) + "\n", encoding="utf-8")
    os.replace(part, path)


def open_run_store(run: Path) -> UpdatableStore:
    """The store of the run's index. ``UserError`` if it has none."""
    name = recorded_store(run)
    if name is None:
        raise UserError(f"{run} has no index yet; make one with: clasp index {run} FOLDER")
    return open_store(run, name)


def index_version(run: Path) -> object:
    """Times at which the index of the run was last written."""
    folder = store_folder(run, recorded_store(run) or "flat")
    return _modified(folder / "manifest.json"), _modified(run / STORE_FILE)


@contextmanager
def writable_store(run: Path, asked: str | None, entries: int, say: MessageCallback) -> Iterator[UpdatableStore]:
    """The store to index ``entries`` images into: ``asked``, the recorded one, or for a new index one for the size.

    ``UserError`` if another engine than ``asked`` holds the index, or another process of this machine writes to it.
    """
    with allow_code(() if asked is None else (asked,)):
        name = _choose(run, asked, entries, say)
    with write_lock(run, name):
        store = open_store(run, name)
        try:
            record_store(run, name)
            yield store
        finally:
            store.close()
        record_store(run, name)


@contextmanager
def server_writer(run: Path, opened: UpdatableStore) -> Iterator[UpdatableStore]:
    """The store to change the run's index in, for a server that reads it through ``opened``.

    ``opened`` itself where one object reads and writes: an embedded engine, which one process at a time has open, and a
    Qdrant server. Else another object: those that read have the earlier state, and a flat store is not read again.
    ``UserError`` if another process of this machine writes to it.
    """
    name = recorded_store(run) or "flat"
    with write_lock(run, name):
        if name == "edge":
            yield opened
        elif is_address(name):
            yield opened
            record_store(run, name)
        elif name == "flat" and isinstance(opened, FlatStore):
            fork = opened.fork()
            try:
                yield fork
            finally:
                fork.release()
        else:
            store = open_store(run, name)
            try:
                store.claim(opened.model, opened.model_name)
                yield store
            finally:
                store.close()


@contextmanager
def write_lock(run: Path, name: str) -> Iterator[None]:
    """For a server, which has no lock of its own: other writers of this run are refused. Folders lock themselves."""
    if not is_address(name):
        yield
        return
    folder = store_folder(run, name)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock_store(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _choose(run: Path, asked: str | None, entries: int, say: MessageCallback) -> str:
    recorded = recorded_store(run)
    if asked is not None:
        check_store_name(asked)
        if recorded not in (None, asked) and (count := _count(run, recorded)):
            raise UserError(
                f"{run} has {counted(count, 'image')} in the store {recorded}, not {asked}; "
                f"move them first: clasp store copy {run} --to {asked}"
            )
        return asked
    if recorded is None:
        name, reason = suggest_store(entries)
        if entries > FLAT_ENTRIES:
            say(f"store {reason}")
        return name
    if recorded == "flat" and entries > FLAT_ENTRIES:
        say(f"{entries:,} images are many for the store flat; clasp store copy {run} --to edge makes searches faster")
    return recorded


def _count(run: Path, name: str) -> int:
    store = open_store(run, name)
    try:
        return store.count()
    finally:
        store.close()


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
