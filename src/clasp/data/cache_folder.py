"""Where everything that can be recomputed is kept: pairs' indexes, features, converted towers, measurements.

Output: the folder. It may be deleted at any time; nothing is created here.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$CLASP_CACHE``, else ``~/.cache/clasp``."""
    return Path(os.environ.get("CLASP_CACHE") or Path.home() / ".cache" / "clasp")
