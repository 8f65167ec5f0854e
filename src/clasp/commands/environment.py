"""Process-wide settings for small machines, set by the command before torch is imported.

Two settings: the wait policy of idle OpenMP threads, and how much freed memory malloc retains.
"""

from __future__ import annotations

import ctypes
import os

# Of glibc's malloc.h. Blocks larger than the first are mapped anew at each allocation, and the kernel zeroes them
# page by page; the second is how much freed memory at the top of the heap is retained.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more
_TRIM_THRESHOLD_BYTES = (2 << 30) - 1

_SPIN_COUNT = 3000  # rounds that a thread of libgomp waits before it sleeps: some 50 microseconds


def configure_environment() -> None:
    """Let idle OpenMP threads sleep soon, and retain freed memory. Environment variables that are set are not changed.

    Threads that spin for long slow a second process many times; threads that sleep at once cost a training step a sixth
    (``benchmarks/threads.py``: on two cores, LoRA in bfloat16 does 89 pairs/s at the spin count here, 75 where threads
    sleep at once; two such processes 37 each, 51 where they sleep at once, 5 to 8 with the runtime's default). Without
    the second setting, a forward pass of EfficientNet-Lite0 spends up to half of its time in the kernel, which maps and
    clears memory for every activation (``benchmarks/allocator.py``).
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # read by OpenMP when torch is imported
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPIN_COUNT))
    if _has_glibc() and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)


def _has_glibc() -> bool:
    """Whether the C library is glibc. Python's ``platform`` knows too, and is slow to import."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows, macOS, and systems that leave it out
        return False
