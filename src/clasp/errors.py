"""``UserError``: an error in what the user gave; and how messages count.

Input: what a message names. Output: text. Note: not in ``types``, so that raising an error does not import torch.
"""

from __future__ import annotations


class UserError(ValueError):
    """An error in the user's input: one line that restates the input and names the valid choices.

    The command prints the line alone and exits with code 2; nothing that was saved is lost. Line breaks in the message,
    from the error of a library or a file name, become spaces.
    """

    def __init__(self, message: object = ""):
        super().__init__(" ".join(line.strip() for line in str(message).splitlines() if line.strip()))


def counted(count: int, noun: str) -> str:
    """A number with its noun, of which the last word is inflected: ``1 key``, ``2,000 keys``, ``3 classes``."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}{'es' if noun.endswith(('s', 'x', 'sh', 'nch', 'rch', 'tch')) else 's'}"
