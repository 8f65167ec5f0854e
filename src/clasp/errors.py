"""``UserError``: an error in what the user gave. Not in ``types``, so that raising it does not import torch."""

from __future__ import annotations


class UserError(ValueError):
    """An error in the user's input: one line that restates the input and names the valid choices.

    The command prints the line alone and exits with code 2; nothing that was saved is lost.
    """
