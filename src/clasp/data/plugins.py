"""What a name in a recipe stands for: a row of a table, or ``package.module:Name`` from outside.

In go the text, the table of the module that owns the kind, and the key that the text stands behind; out comes the row,
or what the user's module has under that name. A mistake is one line that restates the key and names what is valid.
Note: a module is looked for on Python's path and then in the current folder, which is appended to the path so that the
processes that read data find it too.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any

from clasp.types import UserError

OUTSIDE_FORM = "package.module:Name"


def load_named(text: str, table: Mapping[str, Any], key: str) -> Any:
    """The row of ``table`` that ``text`` names; from outside, a function, a class or a row as the table has them.

    Raises ``UserError`` for a name that is in neither; ``key`` is what the line says was set.
    """
    if text in table:
        return table[text]
    if ":" in text:
        return import_named(text, key, rows=tuple({type(row) for row in table.values()}))
    near = difflib.get_close_matches(text, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{key} = {text!r} should be {list_choices(table)}, or {OUTSIDE_FORM!r}{hint}")


def import_named(text: str, key: str, rows: tuple[type, ...] = ()) -> Any:
    """The function, class or instance of ``rows`` that ``package.module:Name`` names.

    Raises ``UserError`` for a module or name that is not there; errors inside the user's own code stay as they are.
    """
    module, _, name = text.partition(":")
    if not name or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{key} = {text!r} does not read as {OUTSIDE_FORM!r}")
    _append_current_folder()
    try:
        names = vars(importlib.import_module(module))
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key} = {text!r}: {error}; a module is looked for on PYTHONPATH and in the current folder"
        ) from None
    found = {name: value for name, value in names.items() if callable(value) or isinstance(value, rows)}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"{key} = {text!r}: {module} has no function {name!r}{hint}")
    return found[name]


def is_module(name: str) -> bool:
    """Whether Python finds a module of this name (one without a dot), without importing it."""
    _append_current_folder()
    return importlib.util.find_spec(name) is not None


def list_choices(table: Mapping[str, Any]) -> str:
    """``'a', 'b' or 'c'``, as the errors of a recipe list what is valid."""
    *others, last = map(repr, table)
    return f"{', '.join(others)} or {last}" if others else last


def _append_current_folder() -> None:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
