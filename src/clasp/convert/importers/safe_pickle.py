"""Other people's ``.pth`` files, read without running anything that is in them.

In: a file that ``torch.save`` wrote. Out: plain dictionaries, lists, numbers, strings and tensors. Unusual: papers keep
their settings in such files as OmegaConf objects, which a safe load refuses. Each class that such an object is made of
is answered here by an inert stand-in that keeps the state it is handed and does nothing; the stand-ins then become
plain values. So omegaconf need not be installed, and neither its code nor anything else that a file names is run.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import serialization

from clasp.types import UserError

_MAX_VALUES, _MAX_DEPTH = 100_000, 100  # a file can share and nest its settings without end; a paper has a hundred


class _Stub:
    """Stands for an object of a class that we will not run: it keeps its state, and that is all."""

    def __new__(cls, *args: Any) -> _Stub:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _OmegaConfContainer(_Stub):
    """omegaconf's ``DictConfig``, ``ListConfig`` and ``UnionNode``: plain in ``_content``."""


class _OmegaConfNode(_Stub):
    """One setting of omegaconf's: plain in ``_val``."""


def _empty_dict(*kind: Any) -> dict:
    """Stands for ``defaultdict(kind)``, in which omegaconf keeps what it has computed."""
    return {}


_NODE_TYPES = ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
# kinds of values that omegaconf notes beside each setting; none of them is ever called
_TYPE_NAMES = ("typing.Any", *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")))
_STUBS: list[Callable | tuple[Callable, str]] = [
    (_OmegaConfContainer, "omegaconf.dictconfig.DictConfig"),
    (_OmegaConfContainer, "omegaconf.listconfig.ListConfig"),
    (_OmegaConfContainer, "omegaconf.base.UnionNode"),
    *((_OmegaConfNode, f"omegaconf.nodes.{name}Node") for name in _NODE_TYPES),
    *((_Stub, f"omegaconf.base.{name}") for name in ("Metadata", "ContainerMetadata")),
    *((_Stub, name) for name in _TYPE_NAMES),
    (_empty_dict, "collections.defaultdict"),
]


def safe_load_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote into ``path``; tensors on the CPU, mapped from the file where its format allows.

    Raises ``UserError`` for a file that cannot be read, is damaged, or names anything that would have to be run.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with _only_stubs_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # the unpickler fails with whatever a damaged or hostile file makes of it
        raise UserError(f"{path} {_reason(error)}") from None
    return _PlainValues(path).value(found, 0)


@contextmanager
def _only_stubs_allowed() -> Iterator[None]:
    """Beside torch's own safe list, the stand-ins count and nothing that was allowed elsewhere in the process."""
    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    try:
        serialization.add_safe_globals(_STUBS)
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f"asks for {named[1]}, which no checkpoint needs; the file is refused, and nothing in it was run"
    return "is not a checkpoint as torch.save writes it, or it is damaged"


class _PlainValues:
    """Turns what was read from ``path`` into plain values, stand-ins and all."""

    def __init__(self, path: Path):
        self.path, self.left = path, _MAX_VALUES

    def value(self, found: Any, depth: int) -> Any:
        """The plain value of ``found``, which lies ``depth`` containers deep."""
        self.left -= 1
        if self.left < 0 or depth > _MAX_DEPTH:
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
                raise UserError(f"{self.path} is not a checkpoint: it names a value by something else than a word")
            case torch.Tensor() if found.numel() * found.element_size() > found.untyped_storage().nbytes():
                raise UserError(f"{self.path} is not a checkpoint: a tensor in it has more numbers than the file")
            case torch.Tensor() | str() | bytes() | bool() | int() | float() | None:
                return found
            case list() | tuple() if type(found) in (list, tuple):
                return type(found)(self.value(item, depth + 1) for item in found)
        kind = type(found).__name__
        raise UserError(f"{self.path} is not a checkpoint: it holds a {kind} where a setting should be")
