"""Inputs of a tower, on the device of the tower."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from clasp.types import Pixels, Pooled, States, Tokens

Inputs = TypeVar("Inputs", bound=Pixels | Tokens | States | Pooled)


def on_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """The same inputs with their tensors on ``device``; tensors that are there already are not copied."""
    named = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return replace(inputs, **{n: t.to(device, non_blocking=True) for n, t in named.items() if isinstance(t, Tensor)})
