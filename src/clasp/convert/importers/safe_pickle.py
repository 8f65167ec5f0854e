"""Loads third-party ``.pth`` files without executing code from them.

Input: a file written by ``torch.save``. Output: plain dictionaries, lists, numbers, strings and tensors. Note: papers
store their settings in such files as OmegaConf objects, which ``weights_only=True`` refuses. Each class of such an
object is replaced by an inert stub that only stores its state; the stubs are then converted to plain values. So
omegaconf need not be installed, and neither its code nor any other code named in the file is run. What torch itself
would make of a crafted file is checked first (``pickle_check``).
"""

from __future__ import annotations

import errno
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import serialization

from clasp.convert.importers.pickle_check import RefusedNameError, check_pickle_file
from clasp.types import UserError

_MAX_VALUES, _MAX_DEPTH = 100_000, 100  # limits for maliciously shared or nested values; a paper has about a hundred


class _Stub:
    """Stub for an object of a class whose code must not run: it only stores its state."""

    def __new__(cls, *args: Any) -> _Stub:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _OmegaConfContainer(_Stub):
    """omegaconf's ``DictConfig``, ``ListConfig`` and ``UnionNode``: the plain value is in ``_content``."""


class _OmegaConfNode(_Stub):
    """A value node of omegaconf: the plain value is in ``_val``."""


def _empty_dict(*kind: Any) -> dict:
    """Stub for ``defaultdict(kind)``, omegaconf's cache of resolved values."""
    return {}


_NODE_TYPES = ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
# value types that omegaconf stores with each setting; none of them is ever called
_TYPE_NAMES = ("typing.Any", *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")))
_STUBS: list[tuple[Callable, str]] = [
    (_OmegaConfContainer, "omegaconf.dictconfig.DictConfig"),
    (_OmegaConfContainer, "omegaconf.listconfig.ListConfig"),
    (_OmegaConfContainer, "omegaconf.base.UnionNode"),
    *((_OmegaConfNode, f"omegaconf.nodes.{name}Node") for name in _NODE_TYPES),
    *((_Stub, f"omegaconf.base.{name}") for name in ("Metadata", "ContainerMetadata")),
    *((_Stub, name) for name in _TYPE_NAMES),
    (_empty_dict, "collections.defaultdict"),
]


def safe_load_pickle(path: Path) -> Any:
    """Load what ``torch.save`` wrote to ``path``; tensors on the CPU, memory-mapped where the format allows.

    Raises ``UserError`` for a file that cannot be read, is damaged, or refers to code outside the allow-list.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        check_pickle_file(path, {*(name for _, name in _STUBS), *_TYPE_NAMES})
        with _only_stubs_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (MemoryError, UserError):
        raise
    except Exception as error:  # a damaged or hostile file can raise any exception
        raise UserError(f"{path} {_reason(error)}") from None
    return _PlainValues(path).value(found, 0)


@contextmanager
def _only_stubs_allowed() -> Iterator[None]:
    """Allow the stubs, torch's own safe globals, and nothing that was allowed elsewhere in the process."""
    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    try:
        serialization.add_safe_globals([*_STUBS])
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of a zip whose offsets are wrong
        return f"cannot be read: {error.strerror}"
    match = re.search(r"GLOBAL (\S+)", str(error))
    named = error.args[0] if isinstance(error, RefusedNameError) else match[1] if match else None
    if named:
        return f"refers to {named}, which no checkpoint needs; the file is refused, and nothing in it was run"
    return "is not a checkpoint as torch.save writes it, or it is damaged"


class _PlainValues:
    """Converts the contents of ``path``, stubs included, to plain values."""

    def __init__(self, path: Path):
        self.path, self.remaining = path, _MAX_VALUES

    def value(self, found: Any, depth: int) -> Any:
        """The plain value of ``found``, nested ``depth`` containers deep."""
        self.remaining -= 1
        if self.remaining < 0 or depth > _MAX_DEPTH:
            raise UserError(f"{self.path} is not a checkpoint: its values are shared or nested without end")
        match found:
            case _OmegaConfContainer():
                return self.value(found.state.get("_content"), depth + 1)
            case _OmegaConfNode():
                return self.value(found.state.get("_val"), depth + 1)
            case _Stub() | type():
                raise UserError(f"{self.path} is not a checkpoint: it holds a class where a setting should be")
            case dict() if all(isinstance(key, str | int | float | None) for key in found):
                return {key: self.value(item, depth + 1) for key, item in found.items()}
            case dict():
                raise UserError(f"{self.path} is not a checkpoint: a key in it is not a string or number")
            case torch.Tensor() if found.numel() * found.element_size() > found.untyped_storage().nbytes():
                raise UserError(f"{self.path} is not a checkpoint: a tensor in it has more numbers than the file")
            case torch.Tensor() | str() | bytes() | bool() | int() | float() | None:
                return found
            case list() | tuple() if type(found) in (list, tuple):
                return type(found)(self.value(item, depth + 1) for item in found)
        kind = type(found).__name__
        raise UserError(f"{self.path} is not a checkpoint: it holds a {kind} where a setting should be")
