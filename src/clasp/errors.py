"""``UserError``: an error in what the user gave; and how messages count and print.

Input: what a message names. Output: text. Note: not in ``types``, so that raising an error does not import torch.
"""

from __future__ import annotations

import re
from pathlib import Path

# control characters, line and paragraph separators, marks that turn the direction of writing, lone surrogates
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """An error in the user's input: one line that restates the input and names the valid choices.

    The command prints the line alone and exits with code 2; nothing that was saved is lost. Line breaks in the message,
    from the error of a library or a file name, become spaces.
    """

    def __init__(self, message: object = ""):
        super().__init__(" ".join(line.strip() for line in str(message).splitlines() if line.strip()))


def printable(text: str) -> str:
    r"""The text on one line, with control characters escaped: ``\x1b``, ``\n``, ``\t``."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def require_printable_path(path: Path) -> None:
    """Raises ``UserError`` for a folder to be written whose name has characters that ``printable`` escapes: a command
    that names it could not be pasted."""
    if found := UNPRINTABLE.search(str(path)):
        raise UserError(
            f"'{printable(str(path))}' has the character '{printable(found[0])}', so that no command could name it; "
            "choose a name without control characters and line breaks"
        )


def counted(count: int, noun: str) -> str:
    """A number with its noun, of which the last word is inflected: ``1 key``, ``2,000 keys``, ``3 classes``."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}{'es' if noun.endswith(('s', 'x', 'sh', 'nch', 'rch', 'tch')) else 's'}"
