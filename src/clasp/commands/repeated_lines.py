"""Status lines of commands that have several parts, each line once.

Input: a callback for lines. Output: the same without lines that it was called with before. Note: every stage, run or
pair of towers reports the precision of its features and the like; of one command these are the same.
"""

from __future__ import annotations

from clasp.types import MessageCallback


def said_once(say: MessageCallback) -> MessageCallback:
    """Calls ``say`` with a line the first time only."""
    said: set[str] = set()

    def first_time(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    return first_time
