"""Checks of names and ids: repeated or unknown ones raise a ``UserError`` of one line.

Input: the given names and the known ones. Output: none, or a ``UserError`` that quotes the first few. Note: nothing is
read here, so callers can check before they compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from clasp.types import UserError


def refuse_repeats(names: Sequence[str], where: str) -> None:
    """Raises ``UserError`` for a name that occurs twice."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{where} hold these more than once: {quote_first(repeated)}")


def require_known(ids: Sequence[str], known: Mapping[str, object], what: str, lacking: str) -> None:
    """Raises ``UserError`` for ids that ``known`` lacks: ``2 of 9 images have no label``."""
    missing = [id for id in ids if id not in known]
    if missing:
        raise UserError(f"{len(missing)} of {len(ids)} {what}s have no {lacking}: {quote_first(missing)}")


def quote_first(names: Sequence[str], most: int = 5) -> str:
    """The first few names in quotes, and how many more there are."""
    listed = ", ".join(map(repr, names[:most]))
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
