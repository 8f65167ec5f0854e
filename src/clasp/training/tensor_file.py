"""A safetensors file with the hash of its content in its metadata.

Input: named tensors and metadata. Output: the file, written atomically; and both read back, checked against the hash.
Note: the hash is of names, dtypes, shapes, values and metadata, so that a flipped bit anywhere is found; a file of an
earlier version has none and is read with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from clasp.data.atomic_files import replace_file
from clasp.types import UserError

_KEY, _HASH = "clasp", "sha256"
_log = logging.getLogger(__name__)


class TensorFile(NamedTuple):
    """The content of a file, without its hash."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors and their hash."""
    # contiguous: those of a CNN are channels-last
    rows = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replace_file(path) as part:
        whole = {**metadata, _HASH: _content_hash(rows, metadata)}
        # under one key: safetensors writes several in any order, and equal weights should be equal files
        safetensors.torch.save_file(rows, part, {_KEY: json.dumps(whole, sort_keys=True)})


def read_tensor_file(path: Path) -> TensorFile:
    """Read a file and check its hash. Raises ``UserError``, one line, where it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            metadata = dict(json.loads(metadata[_KEY])) if _KEY in metadata else metadata
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    recorded = metadata.pop(_HASH, None)
    if recorded is None:
        _log.warning("%s was written by an earlier clasp, without a hash: damage in it would not be found", path)
    elif recorded != _content_hash(tensors, metadata):
        raise UserError(f"{path} is damaged: its content differs from the hash that was saved with it")
    return TensorFile(tensors, metadata)


def _content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
