"""Pairs whose images are all missing: a table that was moved, whose paths start from another folder, or whose images
are in a folder that may not be entered.

Input: pairs, and what to set. Output: none, or a ``UserError`` that ends with why the first cannot be read. Note: it
stops at the first image that is there, so it is cheap before towers are loaded; single missing images are counted when
they are read.
"""

from __future__ import annotations

from clasp.data.formats.setting_hints import SettingHints
from clasp.data.formats.sources import FileSource
from clasp.data.pair_sequence import Pairs
from clasp.errors import counted
from clasp.plain_types import Pair, UserError


def require_images(hints: SettingHints, *opened: Pairs) -> None:
    """Raises ``UserError`` where every image of some pairs is a file that cannot be found. Reads no image that can."""
    for pairs in opened:
        if len(pairs) and not any(map(_is_there, pairs)):
            try:
                pairs[0].image.read()
            except UserError as error:
                none = f"{pairs.name}: none of its {counted(len(pairs), 'image')} can be found"
                raise UserError(f"{none}; {hints.images}; {error}") from None


def _is_there(pair: Pair) -> bool:
    return not isinstance(pair.image, FileSource) or pair.image.version != FileSource.MISSING
