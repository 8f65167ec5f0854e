"""Whether a path is a run folder, by the files that every run has.

Input: a path as typed. Output: none, or the ``UserError`` of a path that is none. Note: nothing here imports torch, so
that a wrong name is refused at once.
"""

from __future__ import annotations

from pathlib import Path

from clasp.errors import UserError

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
