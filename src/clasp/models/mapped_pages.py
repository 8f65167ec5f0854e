"""Gives the pages of memory-mapped weights back to the operating system while they are not read.

Input: tensors. Output: none; those that are mapped from a file, as packaged towers are, leave the resident memory of
the process and are read from the page cache again at their next use. Note: pages that were written to exist in memory
only; a tensor with any such page, or in memory of its own, is left alone. Linux only; elsewhere, and
where the system withholds its page map, nothing is done.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
from torch import Tensor

# Of /proc/PID/pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst): a 64-bit entry for each page.
_ENTRY_BYTES = 8
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61))


def release_mapped_pages(tensors: Iterable[Tensor]) -> None:
    """Drop the resident pages of tensors that are mapped from files and were not written to."""
    if not sys.platform.startswith("linux"):
        return
    on_cpu = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if not on_cpu:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with suppress(OSError), open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # sandboxes may withhold it
        for tensor in on_cpu:
            first = -(-tensor.data_ptr() // mmap.PAGESIZE)
            count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
            if count > 0 and _are_clean(pagemap.fileno(), first, count):
                at, size = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE)
                libc.madvise(at, size, mmap.MADV_DONTNEED)


def _are_clean(pagemap: int, first: int, count: int) -> bool:
    """Whether there are resident pages in a range, and each of them is the file's."""
    entries = np.frombuffer(os.pread(pagemap, count * _ENTRY_BYTES, first * _ENTRY_BYTES), np.uint64)
    held = (entries & (_PRESENT | _SWAPPED)) != 0
    return len(entries) == count and bool(held.any()) and bool((entries[held] & _OF_FILE).all())
