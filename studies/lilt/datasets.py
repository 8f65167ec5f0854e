"""The two worlds by name, opened from the given folders."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from studies.lilt.cells import World
from studies.lilt.emoji_names import Names
from studies.lilt.photos import FILE_8000, SMALL, WHOLE, Photos

from clasp.types import UserError

NOWHERE = Path("nowhere")  # for a page, which needs no data


def world(name: str, options: Namespace, *, run: bool) -> World:
    """``photos`` or ``names``. Raises ``UserError`` where cells are to be run and its folder does not exist."""
    option, folder = ("--photos", options.photos) if name == "photos" else ("--emoji", options.emoji)
    if run and folder is None:
        raise UserError(f"{options.claim} needs {option} FOLDER")
    if run and not folder.is_dir():
        raise UserError(f"{option} {folder} is not a folder")
    if name == "names":
        return Names(folder or NOWHERE)
    if options.larger:
        return Photos(folder or NOWHERE, WHOLE, file=FILE_8000, every=1)
    return Photos(folder or NOWHERE, SMALL)
