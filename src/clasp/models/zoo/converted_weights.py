"""The tensors of packaged towers, converted once and kept in the cache folder as safetensors, with their hashes.

Input: the verified file of a package and the function that reads it. Output: its tensors, memory-mapped, and the hash
of each. Note: both are computed once per machine. At a later start neither the package's file is parsed nor the
tensors are hashed: the hashes are read from a record beside the file, which holds only while the file is the very one
that they were computed from (see ``_FileState``). Where it is not, the tensors are hashed again, and a torn or altered
file is converted anew. The mapping is private: a tensor that is written to changes in memory only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clasp.data.atomic_files import replace_file, write_text_file
from clasp.data.cache_folder import cache_folder
from clasp.models.weight_hashes import hash_tensors

_FORMAT = 1  # increment it when a package's file is read in another way
_ALIGNMENT = 64  # bytes; what torch gives its own tensors, and what its kernels are fastest with
_log = logging.getLogger(__name__)


class ConvertedWeights(NamedTuple):
    """Tensors by name, and the hash of each as ``hash_tensors`` computes it."""

    tensors: dict[str, Tensor]
    hashes: dict[str, str]


class _FileState(NamedTuple):
    """What changes whenever a file is written to. That the hashes of a file in this state may be reused rests on
    ``changed``, the time of the last change of content or metadata: the kernel sets it, and no program can set it
    back. A copy, a restored backup or a rename changes it too, and then costs one pass of hashing."""

    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> _FileState:
        about = path.stat()
        return cls(about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


def read_converted(name: str, sha256: str, read: Callable[[], Mapping[str, Tensor]]) -> ConvertedWeights:
    """The tensors that ``read`` returns for the package's file with this ``sha256``, from the cache if they are there.

    ``name`` is the tower's, for the file name and for log lines. Where the cache cannot be written, a warning is logged
    and the tensors are in memory only.
    """
    path = cache_folder() / "towers" / f"{name}-{_FORMAT}-{sha256[:16]}.safetensors"
    if (cached := _read(path)) is not None:
        return cached
    tensors = {key: tensor.detach().contiguous() for key, tensor in read().items()}
    hashes = hash_tensors(tensors)
    try:
        _write(path, tensors, hashes)
    except (OSError, SafetensorError) as error:  # safetensors hides the operating system's error in its text
        _log.warning("%s: cannot be written (%s); %s is converted again at each start", path, error, name)
        return ConvertedWeights(tensors, hashes)
    return _read(path) or ConvertedWeights(tensors, hashes)


def _read(path: Path) -> ConvertedWeights | None:
    """The cached tensors; ``None`` where there are none, or others than were written (logged)."""
    try:
        state, recorded = _FileState.of(path), json.loads(_record(path).read_text(encoding="utf-8"))
        tensors = {key: _align(tensor) for key, tensor in load_file(path).items()}
        hashes = {str(key): str(value) for key, value in recorded["hashes"].items()}
        if recorded["state"] != list(state):
            if hash_tensors(tensors) != {key: hashes[key] for key in tensors} or len(hashes) != len(tensors):
                raise ValueError("its tensors are not those that were written")
            _write_record(path, state, hashes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, RecursionError) as error:
        _log.warning("%s: torn or altered (%s); converting the tower again", path, error)
        return None
    return ConvertedWeights({key: tensors[key] for key in hashes}, hashes)


def _align(tensor: Tensor) -> Tensor:
    """The tensor, copied where it does not start at a multiple of ``_ALIGNMENT``: only small ones do not."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _record(path: Path) -> Path:
    return path.with_suffix(".json")


def _write(path: Path, tensors: dict[str, Tensor], hashes: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as part:
        save_file(tensors, part, {"padding": ""})
        with part.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        save_file(tensors, part, {"padding": "." * (-header % _ALIGNMENT)})  # the data start behind the header
    _write_record(path, _FileState.of(path), hashes)


def _write_record(path: Path, state: _FileState, hashes: Mapping[str, str]) -> None:
    write_text_file(_record(path), json.dumps({"state": state, "hashes": hashes}))
