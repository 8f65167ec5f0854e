"""The entry point ``main``: runs the verb that was typed, and turns an error of the user into one line.

Exit code 0: success. 2: an error in the user's input, one line. 130: Ctrl-C or SIGTERM, one line. 1: an error in
clasp, with its traceback.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from clasp.cli.server_search import search_by_server
from clasp.commands.launch import exit_interrupted, is_launched
from clasp.errors import UserError, printable
from clasp.training.interrupt import INTERRUPTED_EXIT_CODE, interrupted_by_sigterm


def main() -> None:
    """The entry point: turns a ``UserError`` into one line and exit code 2."""
    _replace_closed_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name that is not UTF-8 is printed escaped, as to sys.stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _require_no_empty_argument(sys.argv)
        with nullcontext() if is_launched() else interrupted_by_sigterm():  # a launcher ends several by SIGTERM
            code = 0 if search_by_server(sys.argv[1:]) else _run_verb(sys.argv[1:])
        if code == INTERRUPTED_EXIT_CODE:  # typer's, of a KeyboardInterrupt that no verb has handled
            exit_interrupted()
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:  # while the verb was imported
        exit_interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        system = isinstance(error, OSError) and error.errno in _USER_ERRNOS
        if not system and not isinstance(error, UserError):
            raise
        from clasp.report.console import print_error

        print_error(_describe_system_error(error) if isinstance(error, OSError) else str(error))
        sys.exit(2)


def _require_no_empty_argument(typed: Sequence[str]) -> None:
    """Raises ``UserError``: an empty path would be the current folder, and an empty name a default."""
    for place, argument in enumerate(typed[1:], 1):
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            after = f" after {typed[place - 1]}" if place > 1 and not argument else ""
            raise UserError(f"argument {place} of the command, {argument!r}{after}, has no value: is a variable unset?")


def _run_verb(typed: Sequence[str]) -> Any:
    """What the verb returns, or its exit code."""
    import typer

    from clasp.cli.verbs import root_command

    usage_error: Any = typer.BadParameter.__mro__[1]  # typer names its subclasses only
    try:
        return root_command(typed[0] if typed else None)(standalone_mode=False)
    except usage_error as error:
        _print_usage_error(error)
        return 2


def _print_usage_error(error: Any) -> None:
    """An argument that is missing or unknown, in one line; without arguments, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return error.show()
    from clasp.report.console import print_error

    command = error.ctx.command_path if error.ctx is not None else "clasp"
    print_error(f"{' '.join(error.format_message().split()).rstrip('.')}; for what it takes: {command} --help")


# errors of the disk and of its owner: no bug of ours, wherever they come from
_FULL, _REFUSED = (errno.ENOSPC, errno.EDQUOT), (errno.EACCES, errno.EPERM, errno.EROFS)
_OF_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)
_USER_ERRNOS = (*_FULL, *_REFUSED, *_OF_PATHS)


def _describe_system_error(error: OSError) -> str:
    if error.errno in _FULL:
        return f"no space left on the disk ({error})"
    return f"{error.filename or 'a file'} cannot be read or written: {error.strerror}"


def _replace_closed_streams() -> None:
    """Standard streams that were closed by whoever started the command are ``None`` in Python."""
    for stream in ("stdout", "stderr"):
        if vars(sys)[stream] is None:
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters: warnings contain file and sample names."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))
