"""SHA-256 hashes of weights and of settings, of which fingerprints are made.

Input: tensors by name, or plain values. Output: hexadecimal digits. Note: tensors on the meta device have no hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def hash_values(*values: Any) -> str:
    """The SHA-256 of plain values, in hexadecimal digits."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The first 16 hexadecimal digits of the SHA-256 of each tensor; tensors on the meta device are left out."""
    hashes = {}
    for name, tensor in tensors.items():
        if not tensor.is_meta:
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            hashes[name] = hashlib.sha256(data).hexdigest()[:16]
    return hashes
