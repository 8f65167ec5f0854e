"""Checks a third-party ``.pth`` file before torch loads it, so that a crafted one costs no more than its own size.

Input: a file, as ``torch.save`` writes it (a zip, or pickles one after another). Output: nothing, or a ``UserError``.
Note: the pickles are interpreted once with inert objects in place of all that they name. What is not in the list of
names that dense tensors and settings need is refused (sparse, quantised, nested and meta tensors, ``bytearray``, tensor
classes that allocate), and so are compressed entries and storages that are larger than the file.
"""

from __future__ import annotations

import pickle
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

from clasp.types import UserError

# names of plain tensors and settings, beside the storages
_PLAIN_NAMES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.nn.parameter.Parameter",
    "torch.Size",
    "torch.device",
    *(f"torch.{kind}" for kind in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
    "_codecs.encode",
}
_ITEM_BYTES = {
    **{f"torch.{kind}Storage": 8 for kind in ("Double", "Long")},
    **{f"torch.{kind}Storage": 4 for kind in ("Float", "Int")},
    **{f"torch.{kind}Storage": 2 for kind in ("Half", "BFloat16", "Short")},
    **{f"torch.{kind}Storage": 1 for kind in ("Char", "Byte", "Bool")},
}
_LEGACY_PICKLES = 5  # magic number, protocol, machine, contents, keys of storages
_MAX_PICKLE_BYTES = 16 << 20  # of all pickles in a file; with an optimizer, the papers' have less than one
_MAX_KEY_CHARACTERS = 10_000
# the opcodes that torch.load(weights_only=True) takes
_OPCODES = (
    "GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWFALSE NEWTRUE "
    "EMPTY_TUPLE EMPTY_LIST EMPTY_DICT BININT BININT1 BININT2 BINFLOAT BINUNICODE SHORT_BINSTRING BINPERSID BINGET "
    "LONG_BINGET BINPUT LONG_BINPUT LONG1 PROTO STOP"
).split()


class RefusedNameError(Exception):
    """A pickle refers to a name that no checkpoint needs."""


def check_pickle_file(path: Path, other_names: Collection[str]) -> None:
    """Interpret the pickles of a checkpoint, which may refer to plain tensors and to ``other_names``.

    Raises ``UserError`` for a file that is compressed, or claims more numbers than it has bytes, ``RefusedNameError``
    for another name, and any exception for a file that is damaged.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            _interpret(_LimitedFile(path, file.read, file.readline), _LEGACY_PICKLES, other_names)
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError(f"{path} is not a checkpoint as torch.save writes it: its entries are compressed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(f"{path} is not a checkpoint: its entries have more bytes than the file")
        (contents,) = (entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl")
        with archive.open(contents) as file:
            _interpret(_LimitedFile(path, file.read, file.readline), 1, other_names)


def _interpret(file: _LimitedFile, pickles: int, other_names: Collection[str]) -> None:
    claimed: dict[str, int] = {}
    for _ in range(pickles):
        _Interpreter(file, {*_PLAIN_NAMES, *other_names}, claimed).load()
    if (total := sum(claimed.values())) > file.path.stat().st_size:
        raise UserError(f"{file.path} is not a checkpoint: its tensors claim {total:,} bytes, more than the file has")


class _LimitedFile:
    """A file of pickles that ends with an error past ``_MAX_PICKLE_BYTES``, before it is read."""

    def __init__(self, path: Path, read: Callable[[int], bytes], readline: Callable[[int], bytes]):
        self.path, self._read, self._readline, self._left = path, read, readline, _MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        return self._counted(self._read(min(size, self._left + 1)))

    def readline(self) -> bytes:
        return self._counted(self._readline(self._left + 1))

    def _counted(self, found: bytes) -> bytes:
        self._left -= len(found)
        if self._left < 0:
            raise UserError(
                f"{self.path} is not a checkpoint: it describes its tensors in over {_MAX_PICKLE_BYTES:,} bytes"
            )
        return found


class _Inert:
    """What stands for every object that a pickle makes."""

    def __new__(cls, *given: Any) -> _Inert:
        return super().__new__(cls)

    def __call__(self, *given: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _Interpreter(pickle._Unpickler):
    """Python's own interpreter of pickles, with inert objects; its memory is bounded by the length of the pickle.

    ``claimed`` gets the bytes of each storage.
    """

    dispatch: ClassVar[dict[int, Callable]] = {
        code: pickle._Unpickler.dispatch[code] for code in (vars(pickle)[name][0] for name in _OPCODES)
    }

    def __init__(self, file: _LimitedFile, names: Collection[str], claimed: dict[str, int]):
        super().__init__(file, encoding="utf-8")  # as torch
        self._path, self._names, self._claimed = file.path, names, claimed

    def find_class(self, module: str, name: str) -> Any:
        # the names of Python 2, as torch maps them
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in _ITEM_BYTES:
            return full
        if full not in self._names:
            raise RefusedNameError(full)
        return _Inert

    def persistent_load(self, pid: Any) -> _Inert:
        kind, storage, key, _, numbers, *_ = pid
        if kind != "storage" or not isinstance(numbers, int) or numbers < 0 or len(str(key)) > _MAX_KEY_CHARACTERS:
            raise pickle.UnpicklingError("no storage")
        self._claimed[str(key)] = max(self._claimed.get(str(key), 0), numbers * _ITEM_BYTES[storage])
        return _Inert()

    def check_keys(self, keys: Collection[Any]) -> None:
        """Keys are plain: the hash of a tuple nested a million times would overflow the stack."""
        if not all(isinstance(key, str | int | float | None) for key in keys):
            raise UserError(f"{self._path} is not a checkpoint: a key in it is not a string or number")


def _set_item(interpreter: Any) -> None:
    interpreter.check_keys(interpreter.stack[-2:-1])
    pickle._Unpickler.dispatch[pickle.SETITEM[0]](interpreter)


def _set_items(interpreter: Any) -> None:
    interpreter.check_keys(interpreter.stack[::2])
    pickle._Unpickler.dispatch[pickle.SETITEMS[0]](interpreter)


_Interpreter.dispatch |= {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items}
