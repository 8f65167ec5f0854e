"""Chooses the compute precision: float32, or bfloat16 where it is actually faster.

Input: a device and the recipe's setting. Output: ``PrecisionChoice``, the precision and the reason as a sentence, for a
training step; and ``frozen_precision``, that of a forward pass without gradients (feature cache, ``encode_image``,
``encode_text``, index, evaluation). Note: on a CPU the choice is measured, not read from a list of features. CPUs
without bfloat16 instructions emulate it, up to hundreds of times slower than float32, so both are timed, once per
machine: the choice is kept in the cache folder (``precision.json``) under the processor, the version of torch and the
number of threads, since a choice that changed between two starts would change features. The benchmark starts with a
tiny matrix and never starts a product that would take long.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from clasp.data.atomic_files import write_text_file
from clasp.data.cache_folder import cache_folder
from clasp.plain_types import Precision

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
    """The faster precision of a device; detected once per process and device type, on a CPU once per machine."""
    return _detect(device.type)


def frozen_precision(resolved: Precision, *, convolutional: bool) -> Precision:
    """The precision of a tower's forward pass without gradients; ``resolved``: that of the device or the recipe.

    Convolutional towers stay in float32: in bfloat16, the lowest cosine of a feature of EfficientNet-Lite0 with that in
    float32 is 0.997, of the packaged transformers 0.9997, and R@5 of the quick demo falls by 0.3 to 1.4 points; with
    texts in bfloat16, by 0 to 0.2 (dev/LOG.md).
    """
    return "float32" if convolutional else resolved


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Context in which a forward pass computes in this precision; in float32, nothing is changed."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


# --- detection -------------------------------------------------------------------------------------------------------


@cache
def _detect(kind: str) -> PrecisionChoice:
    if kind == "cuda":
        # Emulated bfloat16 (before Ampere) counts as supported by default, and is slower than float32.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return PrecisionChoice("bfloat16", "this GPU computes bfloat16 in hardware")
        return PrecisionChoice("float32", "this GPU has no bfloat16 in hardware")
    if kind == "cpu":
        return _recall(cache_folder() / "precision.json") or _measure(cache_folder() / "precision.json")
    return PrecisionChoice("float32", f"bfloat16 is not tested on {kind}; train.precision can set it")


def _recall(path: Path) -> PrecisionChoice | None:
    """The choice that was measured on this machine; ``None`` where none is recorded, or the file cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        precision, reason = json.loads(path.read_text(encoding="utf-8"))[_machine()]
        if precision in get_args(Precision):
            return PrecisionChoice(precision, str(reason))
    return None


def _measure(path: Path) -> PrecisionChoice:
    """Measure the choice and record it beside those of other machines; a cache that cannot be written is left alone."""
    choice, recorded = _probe(), {}
    with suppress(OSError, ValueError, TypeError):
        recorded = dict(json.loads(path.read_text(encoding="utf-8")))
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_file(path, json.dumps({**recorded, _machine(): choice}, indent=1))
    return choice


def _machine() -> str:
    """What the speeds depend on: the processor with its instructions, the version of torch, the number of threads."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    instructions = facts.get("flags") or facts.get("Features") or ""
    model = facts.get("model name") or platform.processor() or platform.machine()
    digest = hashlib.sha256(instructions.encode()).hexdigest()[:8]
    return f"{model}, instructions {digest}, torch {torch.__version__}, {torch.get_num_threads()} threads"


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
