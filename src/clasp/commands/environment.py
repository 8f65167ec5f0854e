"""Process-wide settings for small machines, set by the command before torch is imported.

Two settings: the wait policy of idle OpenMP threads, and how much freed memory malloc retains.
"""

from __future__ import annotations

import ctypes
import os
import platform

# Of glibc's malloc.h. Blocks larger than the first are mapped anew at each allocation, and the kernel zeroes them
# page by page; the second is how much freed memory at the top of the heap is retained.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more
_TRIM_THRESHOLD_BYTES = (2 << 30) - 1


def configure_environment() -> None:
    """Let idle OpenMP threads sleep, and retain freed memory. Environment variables that are set are not changed.

    Two processes that spin while they wait slow each other ten times on two cores. Without the second, a forward pass
    of EfficientNet-Lite0 spends up to half of its time in the kernel, which maps and clears memory for every activation
    (``benchmarks/allocator.py``: 43 ms of processor time an image in batches of 32, 22 with it and in batches of 8).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by OpenMP when torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
