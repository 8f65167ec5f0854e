"""Where everything that can be recomputed is kept: pairs' indexes, features, converted towers, measurements.

Output: the folder. It may be deleted at any time; nothing is created here.
"""

from __future__ import annotations

import os
from pathlib import Path

from clasp.errors import UserError


def cache_folder() -> Path:
    """``$CLASP_CACHE``, else ``~/.cache/clasp``. Raises ``UserError`` where there is neither."""
    folder = os.environ.get("CLASP_CACHE") or os.path.expanduser("~/.cache/clasp")
    if folder.startswith("~"):
        raise UserError("this user has no home folder for the cache: set CLASP_CACHE to a folder, or HOME")
    return Path(folder)
