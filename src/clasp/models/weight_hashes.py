"""Hashes of weights and of settings: what fingerprints are made of.

In go tensors by name, or plain values; out come hexadecimal digits. Note: tensors on the meta device have none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def hash_values(*values: Any) -> str:
    """The sha256 of plain values, in hexadecimal digits."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Sixteen hexadecimal digits of the sha256 of each tensor (none on the meta device)."""
    hashes = {}
    for name, tensor in tensors.items():
        if not tensor.is_meta:
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            hashes[name] = hashlib.sha256(data).hexdigest()[:16]
    return hashes
