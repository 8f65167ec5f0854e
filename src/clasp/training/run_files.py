"""The files of a run folder: their names, and whether a path has those that every run has.

Input: a path as typed. Output: none, or the ``UserError`` of a path that is no run. Note: nothing here imports torch,
so that a wrong name is refused at once.
"""

from __future__ import annotations

from pathlib import Path

from clasp.errors import UserError

LOG_FILE, RESULTS_FILE = "log.jsonl", "results.jsonl"
STATE_FOLDER = "state"
STATE_NAMES = ("state.safetensors", "previous.safetensors")
"""In the state folder, the newest first"""
PLAN_FILE = "plan.json"
"""Of a run with ``[auto]``: what was tried, and whether it is finished"""
_NEEDED = ("recipe.toml", "base.json", "transform.json", "tokenizer")


def require_folder(run: Path) -> None:
    """Raises ``UserError`` unless there is a folder, of whatever kind."""
    if not run.is_dir():
        raise UserError(f"no run at {run}: {'it is a file' if run.exists() else 'no such folder'}")


def require_run_folder(run: Path) -> None:
    """Raises ``UserError`` unless the folder has what every run has."""
    require_folder(run)
    missing = [name for name in _NEEDED if not (run / name).exists()]
    if missing:
        raise UserError(f"{run} is not a run folder: it has no {', '.join(missing)}")
