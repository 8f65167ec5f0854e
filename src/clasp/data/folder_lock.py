"""The lock of a folder that one process writes to at a time, such as a run folder.

Input: a folder, made if it is missing. Output: a context that holds its lock, a file ``lock`` that names the process; a
second process gets a ``UserError``. Note: the lock is ``flock``, which the system releases when a process ends, however
it ends, so a lock file that a killed process left is taken over. On a file system without ``flock``, and on a system
without it, the number of the process is compared instead, with a warning: that sees no process on another machine.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clasp.data.atomic_files import translate_disk_errors
from clasp.errors import UserError

LOCK_FILE = "lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NOT_SUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
_log = logging.getLogger(__name__)


@contextmanager
def lock_folder(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of ``folder``; one that is made here and still empty at the end is removed.

    Yields a function that raises ``UserError`` once the folder is no longer at its path. Raises ``UserError`` naming
    the process that holds the lock.
    """
    path = folder / LOCK_FILE
    with translate_disk_errors(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
        locked = folder.stat()

    def require_held() -> None:
        if not _is_same(locked, folder):
            raise UserError(
                f"{folder} was moved, deleted or replaced while this process wrote to it; what was saved is in the "
                "folder where it is now"
            )

    try:
        yield require_held
    finally:
        try:
            if _is_same(os.fstat(descriptor), path):  # else the folder was moved, and its place may be another run's
                path.unlink()  # before it is released: the next holder then makes a file of its own
        finally:
            os.close(descriptor)
        if made and _is_same(locked, folder):
            with suppress(OSError):
                folder.rmdir()


def require_unlocked(folder: Path) -> None:
    """Raises ``UserError`` naming the process that holds the lock of ``folder``; takes none."""
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        _lock(descriptor, path)
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, path)
            if _is_same(os.fstat(descriptor), path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process that held it has removed it meanwhile


def _is_same(status: os.stat_result, path: Path) -> bool:
    """Whether this file or folder is the one at the path."""
    try:
        return os.path.samestat(status, path.stat())
    except OSError:  # nothing is there, or a file in the place of a folder above
        return False


def _lock(descriptor: int, path: Path) -> None:
    """Lock an open file; by the number of its process where there is no ``flock``."""
    holder = _read_holder(descriptor)
    try:
        import fcntl  # not on every system

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        _compare_processes(holder, path)
    except OSError as error:
        if error.errno in _TAKEN:
            raise _taken(holder, path) from None
        if error.errno not in _NOT_SUPPORTED:
            raise
        _compare_processes(holder, path)


def _compare_processes(holder: dict[str, Any], path: Path) -> None:
    _log.warning("%s: this file system has no locks (flock); only processes of this machine are kept out", path.parent)
    if holder and (holder.get("host") != platform.node() or _is_running(int(holder.get("process", 0)))):
        raise UserError(f"{_taken(holder, path)}; if that process has ended, delete {path}")


def _taken(holder: dict[str, Any], path: Path) -> UserError:
    host = holder.get("host")
    there = "" if host in (None, platform.node()) else f" on {host}"
    who = f"process {holder['process']}{there} ({holder['command']})" if holder else "another process"
    return UserError(f"{path.parent} is being written to by {who}; wait for it, or choose another folder")


def _this_process() -> dict[str, Any]:
    command = " ".join((Path(sys.argv[0]).name, *sys.argv[1:3]))
    return {"process": os.getpid(), "host": platform.node(), "command": command[:100]}


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return {"process": int(holder["process"]), "host": str(holder["host"]), "command": str(holder["command"])}
    except (ValueError, KeyError, TypeError):  # empty, or just being written
        return {}


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
