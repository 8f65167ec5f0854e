"""Where everything that can be recomputed is kept: pairs' indexes, features, converted towers, measurements.

Output: the folder. It may be deleted at any time; nothing is created here.
"""

from __future__ import annotations

import os
from pathlib import Path

from clasp.errors import UserError


def cache_folder() -> Path:
    """``$CLASP_CACHE``, else ``~/.cache/clasp``; ``~`` is the home folder. Raises ``UserError`` where there is none."""
    given = os.environ.get("CLASP_CACHE")
    folder = os.path.expanduser(given or "~/.cache/clasp")
    if folder.startswith("~"):
        why = f"CLASP_CACHE={given}: there is no such home folder" if given else "this user has no home folder"
        raise UserError(f"{why} for the cache: set CLASP_CACHE to a folder, or HOME")
    return Path(folder)
