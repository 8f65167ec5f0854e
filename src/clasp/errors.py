"""``UserError``: an error in what the user gave. Not in ``types``, so that raising it does not import torch."""

from __future__ import annotations


class UserError(ValueError):
    """An error in the user's input: one line that restates the input and names the valid choices.

    The command prints the line alone and exits with code 2; nothing that was saved is lost. Line breaks in the message,
    from the error of a library or a file name, become spaces.
    """

    def __init__(self, message: object = ""):
        super().__init__(" ".join(line.strip() for line in str(message).splitlines() if line.strip()))
