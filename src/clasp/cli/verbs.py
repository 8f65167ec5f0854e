"""Which module of this package defines a verb: a command imports its own alone.

Input: the verb as typed. Output: the root command with that verb, or with all of them, in the order of the table.
"""

from __future__ import annotations

from importlib import import_module

import typer
from typer.models import CommandInfo

from clasp.cli.app import app

_VERBS = {
    "train": ("demo", "params", "doctor", "train", "resume"),
    "pair": ("pair",),
    "evaluate": ("eval", "compare", "analyze", "report"),
    "maps": ("maps",),
    "convert": ("import", "export"),
    "search": ("index", "watch", "search", "serve"),
    "store": ("store",),
}
_HOMES = {verb: module for module, verbs in _VERBS.items() for verb in verbs}


def root_command(verb: str | None = None) -> typer.Typer:
    """The root command with the verbs of one module; with all where no module has this verb."""
    for module in [_HOMES[verb]] if verb in _HOMES else _VERBS:
        import_module(f"clasp.cli.{module}")  # adds its verbs to the root command
    app.registered_commands.sort(key=_place)
    return app


def _place(command: CommandInfo) -> int:
    """Where the verb stands in the table: modules may be imported one by one."""
    assert command.callback is not None
    return list(_HOMES).index(command.name or command.callback.__name__)
