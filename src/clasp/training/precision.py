"""Chooses the compute precision: float32, or bfloat16 where it is actually faster.

Input: a device and the recipe's setting. Output: ``PrecisionChoice``, the precision and the reason as a sentence. Note:
on a CPU the choice is measured, not read from a list of features. CPUs without bfloat16 instructions emulate it, up to
hundreds of times slower than float32, so both are timed once per process. The benchmark starts with a tiny matrix and
never starts a product that would take long.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Literal, NamedTuple

import torch

Precision = Literal["float32", "bfloat16"]

# Weights and activations are cast before every product; the casts cancel a smaller speed-up than this.
_MIN_SPEEDUP = 1.2
_PROBE_SIZES = (32, 64, 128, 256, 512)
_MAX_PROBE_SECONDS = 0.005


class PrecisionChoice(NamedTuple):
    """A precision and the reason for it."""

    precision: Precision
    reason: str


def resolve_precision(choice: Literal["auto"] | Precision, device: torch.device) -> PrecisionChoice:
    """The recipe's precision; for "auto" that of ``detect_precision``."""
    if choice == "auto":
        return detect_precision(device)
    return PrecisionChoice(choice, "set by the recipe")


def detect_precision(device: torch.device) -> PrecisionChoice:
    """The faster precision of a device; detected once per process and device type."""
    return _detect(device.type)


@cache
def _detect(kind: str) -> PrecisionChoice:
    if kind == "cuda":
        # Emulated bfloat16 (before Ampere) counts as supported by default, and is slower than float32.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return PrecisionChoice("bfloat16", "this GPU computes bfloat16 in hardware")
        return PrecisionChoice("float32", "this GPU has no bfloat16 in hardware")
    if kind == "cpu":
        return _probe()
    return PrecisionChoice("float32", f"bfloat16 is not tested on {kind}; train.precision can set it")


def _probe() -> PrecisionChoice:
    """Times square matrix products, doubling the size while the next one stays short."""
    ratio, size = 1.0, 0
    for size in _PROBE_SIZES:
        float32, bfloat16 = time_matmul(torch.float32, size), time_matmul(torch.bfloat16, size)
        ratio = float32 / bfloat16
        if 8 * max(float32, bfloat16) > _MAX_PROBE_SECONDS:  # doubling the size means eight times the FLOPs
            break
    measured = f"a {size} × {size} product in bfloat16 runs at {ratio:.2g} times the speed of float32 on this CPU"
    return PrecisionChoice("bfloat16" if ratio >= _MIN_SPEEDUP else "float32", measured)


def time_matmul(dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """Seconds of a square matrix product: the fastest of a few repeats, which is the least disturbed."""
    matrix = torch.ones(size, size, dtype=dtype)
    torch.mm(matrix, matrix)  # warm-up: the first product of a size also prepares its kernel
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - started)
    return max(min(seconds), 1e-9)
