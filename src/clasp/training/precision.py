"""Which numbers to compute in: float32, or bfloat16 where the machine is really faster in it.

In: a device and the recipe's choice. Out: ``PrecisionChoice``, the choice made and the reason as a sentence.
Unusual: on a CPU nothing is read off a list of features. Processors without bfloat16 instructions compute it all the
same, up to hundreds of times slower than float32, so both are timed once per process. The probe starts with a
tiny matrix and never begins a product that would take long.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Literal, NamedTuple

import torch

Precision = Literal["float32", "bfloat16"]

# Weights and activations are cast on the way into every product; a smaller gain than this is eaten by the casts.
_MIN_SPEEDUP = 1.2
_PROBE_SIZES = (32, 64, 128, 256, 512)
_MAX_PROBE_SECONDS = 0.005


class PrecisionChoice(NamedTuple):
    """A precision and why it was chosen."""

    precision: Precision
    reason: str


def resolve_precision(choice: Literal["auto"] | Precision, device: torch.device) -> PrecisionChoice:
    """The recipe's word where it has one, else what ``detect_precision`` finds."""
    if choice == "auto":
        return detect_precision(device)
    return PrecisionChoice(choice, "set by the recipe")


def detect_precision(device: torch.device) -> PrecisionChoice:
    """The faster precision of a device; asked once per process for each kind of device."""
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
    return PrecisionChoice("float32", f"bfloat16 is not tried on {kind}; train.precision can set it")


def _probe() -> PrecisionChoice:
    """Times square products, each twice the size of the last, while the next would still be short."""
    ratio, size = 1.0, 0
    for size in _PROBE_SIZES:
        float32, bfloat16 = time_matmul(torch.float32, size), time_matmul(torch.bfloat16, size)
        ratio = float32 / bfloat16
        if 8 * max(float32, bfloat16) > _MAX_PROBE_SECONDS:  # twice the size is eight times the arithmetic
            break
    measured = f"a {size} × {size} product in bfloat16 runs at {ratio:.2g} times the speed of float32 on this CPU"
    return PrecisionChoice("bfloat16" if ratio >= _MIN_SPEEDUP else "float32", measured)


def time_matmul(dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """Seconds of the fastest of a few products of two square matrices; the fastest is the least disturbed."""
    matrix = torch.ones(size, size, dtype=dtype)
    torch.mm(matrix, matrix)  # the first product of a size also builds its kernel
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - started)
    return max(min(seconds), 1e-9)
