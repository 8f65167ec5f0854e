"""The class of each pair: which column names it, and what an error says where none does.

Input: pairs and the option ``label=``. Output: whether all have a class, or a ``UserError`` that names the columns
there are. Note: pairs that have captions and no class are for another task, which the error names.
"""

from __future__ import annotations

from collections.abc import Sequence

from clasp.types import Pair, UserError

CAPTIONS_HINT = "pairs of images and captions are evaluated with: retrieval"


def has_labels(pairs: Sequence[Pair], label: str | None, data: str) -> bool:
    """Whether pairs name their class in ``label`` of their meta (``class`` where it is ``None``).

    Raises ``UserError`` where only some do, and where none do though the label was asked for.
    """
    column = label or "class"
    lacking = [pair for pair in pairs if column not in pair.meta]
    if lacking and (label or len(lacking) < len(pairs)):
        raise UserError(
            f"{lacking[0].id} of {data} has no column {column!r} with its class; {label_choices(lacking[0])}"
        )
    return not lacking


def label_choices(pair: Pair) -> str:
    """What ``label=`` can be, for an error: the columns of a pair beside its image and captions."""
    return f"{column_choices('label', pair)}; {CAPTIONS_HINT}"


def column_choices(option: str, pair: Pair) -> str:
    """What an option that names a column can be, for an error."""
    columns = ", ".join(map(str, pair.meta))
    return f"{option}= one of: {columns}" if columns else f"there is no column that {option}= could name"
