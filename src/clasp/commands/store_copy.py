"""The command ``clasp store copy``: move the index of a run to another engine.

Input: a run folder and the engine. Output: the number of entries. Note: the earlier index is deleted only after the
copy has been compared with it and recorded; an interrupted copy leaves the run as it was and can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clasp.commands.run_store import record_store, recorded_store, write_lock
from clasp.plain_types import ProgressFactory, UserError, no_progress_bar
from clasp.search.store_copy import copy_entries
from clasp.search.store_registry import check_store_name, delete_store, open_store
from clasp.serve.warm_server import running_server


@dataclass(frozen=True, slots=True)
class StoreCopy:
    """What was moved, from which engine, to which."""

    entries: int
    source: str
    target: str


def copy_index(run: Path, target: str, *, bar: ProgressFactory = no_progress_bar) -> StoreCopy:
    """Move the run's index to the engine ``target``. ``UserError`` if it is there already, or there is none."""
    check_store_name(target)
    source = recorded_store(run)
    if source is None:
        raise UserError(f"{run} has no index yet; make one with: clasp index {run} FOLDER --store {target}")
    if source == target:
        raise UserError(f"the index of {run} is in the store {source} already")
    if "edge" in (source, target) and (server := running_server(run)):
        raise UserError(
            f"{run} is served at {server.address}, and one process at a time can use a store of the engine edge; stop "
            f"that server (process {server.pid}), copy, and start it again"
        )
    with write_lock(run, target), write_lock(run, source):
        old = open_store(run, source)
        try:
            if not old.count():
                raise UserError("nothing has been indexed yet; type: clasp index RUN FOLDER")
            old.delete(())  # takes the write lock of the folder
            new = open_store(run, target)
            try:
                with bar(f"entries from {source} to {target}") as progress:
                    entries = copy_entries(old, new, progress)
            finally:
                new.close()
            record_store(run, target)
        finally:
            old.close()
        delete_store(run, source)
    return StoreCopy(entries, source, target)
