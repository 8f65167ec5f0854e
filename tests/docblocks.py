"""The pages of the documentation, their fenced blocks, and the ``clasp`` commands in these.

In: the text of a page. Out: its ``sh`` and ``python`` blocks in their order. Note: a block below a line
``<!-- not run: REASON -->`` is not run by ``tests_docs``; its commands are parsed all the same.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("[!_]*/*.md"))]
_FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n+)?^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ENDS_A_COMMAND = {"&", "&&", "||", "|", ";", "done"}


class Block(NamedTuple):
    """A fenced block: ``sh`` or ``python``."""

    language: str
    text: str
    runs: bool


def read_blocks(page: str) -> list[Block]:
    """The blocks of a page."""
    return [Block(language, text, runs=not skipped) for skipped, language, text in _FENCE.findall(page)]


def clasp_commands(script: str) -> Iterator[list[str]]:
    """The arguments of every ``clasp`` (or ``-m clasp``) in a shell script, without those of what follows it."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace(";", " ; "), comments=True)
        starts = [place + 1 for place, word in enumerate(words) if word == "clasp"]
        for start in starts:
            end = next((k for k in range(start, len(words)) if words[k] in _ENDS_A_COMMAND), len(words))
            yield words[start:end]
