"""Resolve a name in a recipe: a key of a registry, or ``package.module:Name`` for a plugin of the user.

Input: the name, the registry (a plain dict), and the recipe key it was given for. Output: the registered entry, or the
object of the user's module. An unknown name is one line that restates the key and lists the valid names. Note: a module
is searched on ``sys.path`` and then in the current folder, which is appended to ``sys.path`` so that data worker
processes find it too.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from clasp.plain_types import UserError

OUTSIDE_FORM = "package.module:Name"
_FEW_NAMES = 20


def load_named(text: str, table: Mapping[str, Any], key: str) -> Any:
    """The entry of ``table`` named ``text``, or a plugin: a function, a class, or an instance of an entry's class.

    Raises ``UserError`` for a name that is neither; ``key`` is the recipe key shown in the error.
    """
    if text in table:
        return table[text]
    if ":" in text:
        return import_named(text, key, rows=tuple({type(row) for row in table.values()}))
    near = difflib.get_close_matches(text, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{key} = {text!r} should be {list_choices(table)}, or {OUTSIDE_FORM!r}{hint}")


def import_named(text: str, key: str, rows: tuple[type, ...] = ()) -> Any:
    """Import ``package.module:Name``: a function, a class, or an instance of one of the classes ``rows``.

    Raises ``UserError`` for a missing module or name; exceptions raised inside the module propagate.
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
    """Whether a top-level module of this name can be imported; does not import it."""
    _append_current_folder()
    return importlib.util.find_spec(name) is not None


def list_choices(table: Mapping[str, Any]) -> str:
    """The keys as ``'a', 'b' or 'c'``, for error messages."""
    *others, last = map(repr, table)
    return f"{', '.join(others)} or {last}" if others else last


def valid_names(given: str, known: Sequence[str]) -> str:
    """What a name could have been, for error messages: every known name where they are few, else the nearest."""
    if len(known) > _FEW_NAMES:
        return f"nearest of {len(known)}: {', '.join(difflib.get_close_matches(given, known, n=3, cutoff=0.0))}"
    near = difflib.get_close_matches(given, known, n=1)
    return f"there are {', '.join(known)}{f'; did you mean {near[0]}?' if near else ''}"


def _append_current_folder() -> None:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
