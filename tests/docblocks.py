"""The pages of the documentation, their fenced blocks, and the ``clasp`` commands in these.

In: the text of a page. Out: its ``sh``, ``python``, ``toml`` and ``ini`` blocks in their order. Note: a block below a
line ``<!-- not run: REASON -->`` is not run by ``tests_docs``; its commands are parsed all the same.
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
_FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n+)?^```(sh|python|toml|ini)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ENDS_A_COMMAND = {"&", "&&", "||", "|", ";", "do", "done"}
_ASSIGNMENT = re.compile(r"\w+=")


class Block(NamedTuple):
    """A fenced block: ``sh``, ``python``, ``toml`` or ``ini``; the latter two are never run."""

    language: str
    text: str
    runs: bool


def read_blocks(page: str) -> list[Block]:
    """The blocks of a page."""
    return [
        Block(language, text, runs=not skipped and language in ("sh", "python"))
        for skipped, language, text in _FENCE.findall(page)
    ]


def shell_commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, each without assignments before it."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace(";", " ; "), comments=True)
        while words:
            end = next((k for k, word in enumerate(words) if word in _ENDS_A_COMMAND), len(words))
            command = words[:end]
            while command and _ASSIGNMENT.match(command[0]):
                command = command[1:]
            if command:
                yield command
            words = words[end + 1 :]


def inline_commands(page: str) -> list[str]:
    """What stands in the text of a page as code that begins with ``clasp``."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.replace("\\|", "|").split()) for code in re.findall(r"`(clasp [^`]+)`", text)]


def clasp_commands(script: str) -> Iterator[list[str]]:
    """The arguments of every ``clasp`` (by its path too, or ``-m clasp``) in a script, without what follows it."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace(";", " ; "), comments=True)
        starts = [place + 1 for place, word in enumerate(words) if word == "clasp" or word.endswith("/bin/clasp")]
        for start in starts:
            end = next((k for k in range(start, len(words)) if words[k] in _ENDS_A_COMMAND), len(words))
            yield words[start:end]
