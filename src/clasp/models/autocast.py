"""Whether autocast is on where tensors are."""

from __future__ import annotations

import torch


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; never for the meta device, which PyTorch refuses to be asked about."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
