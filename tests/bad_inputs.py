"""How the tests ask whether a wrong input is refused: in one line that says what it should."""

from pathlib import Path

import pytest

from clasp.data.pairs import ColumnNames, open_pairs
from clasp.types import UserError


def refused(source: str | Path, *wanted: str, **columns: str) -> str:
    """The line with which ``open_pairs`` refuses a source; it must hold all that is wanted, and the source's name."""
    with pytest.raises(UserError) as error:
        open_pairs(source, columns=ColumnNames(**columns))
    line = str(error.value)
    assert "\n" not in line
    for words in (*wanted, *([source.name] if isinstance(source, Path) else [])):
        assert words in line, line
    return line
