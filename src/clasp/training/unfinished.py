"""Whether a run was trained to its end: a line for commands that use one that was not.

Input: a run folder. Output: the line. Note: files alone tell; nothing here imports torch, since search asks too.
"""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path

from clasp.errors import UserError
from clasp.training.run_files import LOG_FILE, PLAN_FILE, STATE_FOLDER, STATE_NAMES


def unfinished_lines(run: Path | None) -> list[str]:
    """Where the training of a run was stopped, and what goes on from there; no line for a run that is finished, nor for
    a model that is no run."""
    if run is None:
        return []
    if not any((run / STATE_FOLDER / name).exists() for name in STATE_NAMES) and not _has_unfinished_plan(run):
        return []
    return [f"{run} was stopped {_place(run)}; go on with: clasp resume {shlex.quote(str(run))}"]


def _has_unfinished_plan(run: Path) -> bool:
    with suppress(OSError, ValueError, RecursionError, AttributeError):  # damaged: said by what reads all of it
        return not json.loads((run / PLAN_FILE).read_text(encoding="utf-8-sig")).get("finished", True)
    return False


def _place(run: Path) -> str:
    """The step of the weights that are in the folder, where the log has it."""
    from clasp.data.atomic_files import read_json_lines  # here: it is slow to import, and most runs are finished

    with suppress(OSError, UserError, KeyError, TypeError):
        events = read_json_lines(run / LOG_FILE)
        last = {event["event"]: event for event in events}
        if last["stop"]["interrupted"]:
            return f"at step {last['stop']['step']:,} of {last['start']['steps']:,}"
    return "before its end"
