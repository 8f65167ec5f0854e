"""Moves tower inputs to a device."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from clasp.types import HiddenStates, Pixels, PooledFeatures, Tokens

_TowerInput = TypeVar("_TowerInput", bound=Pixels | Tokens | HiddenStates | PooledFeatures)


def to_device(inputs: _TowerInput, device: torch.device | str) -> _TowerInput:
    """The inputs with their tensors on ``device``; tensors already on it are not copied."""
    named = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return replace(inputs, **{n: t.to(device, non_blocking=True) for n, t in named.items() if isinstance(t, Tensor)})
