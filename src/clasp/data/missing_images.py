"""Pairs whose images are all missing: a table that was moved, or whose paths start from another folder.

Input: pairs, and what to set. Output: none, or a ``UserError`` that names the first path. Note: it stops at the first
image that is there, so it is cheap before towers are loaded; single missing images are counted when they are read.
"""

from __future__ import annotations

from clasp.data.formats.setting_hints import SettingHints
from clasp.data.formats.sources import FileSource
from clasp.data.pair_sequence import Pairs
from clasp.errors import counted
from clasp.plain_types import Pair, UserError


def require_images(hints: SettingHints, *opened: Pairs) -> None:
    """Raises ``UserError`` where every image of some pairs is a file that does not exist. Reads no image."""
    for pairs in opened:
        if len(pairs) and not any(map(_is_there, pairs)):
            images, first = counted(len(pairs), "image"), pairs[0].image.name
            raise UserError(f"{pairs.name}: none of its {images} is there; the first would be {first}; {hints.images}")


def _is_there(pair: Pair) -> bool:
    return not isinstance(pair.image, FileSource) or pair.image.version != FileSource.MISSING
