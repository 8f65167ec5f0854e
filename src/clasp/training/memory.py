"""Memory measurements: free memory of a device, and activation memory saved for the backward pass.

Input: a device; or code run inside ``ActivationMemory``. Output: bytes. Note: nothing is estimated from model shapes.
Activation memory is counted by autograd's saved-tensor hooks, free memory is read from the operating system, within a
container's cgroup limit.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Memory limit of this container, its usage, and the entry of memory.stat for the reclaimable page cache in it: cgroups
# v2 and v1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


class ActivationMemory:
    """A context that measures ``bytes``, the peak of the tensors saved for the backward pass of what runs inside.

    ``weights`` do not count. A view counts with its whole storage, since that is kept alive, and each storage counts
    once.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._holders: Counter[int] = (
            Counter()
        )  # saved tensors by storage address; an address is reused once its storage is freed
        self._now = 0
        self._hooks: Any = saved_tensors_hooks(self._pack, _SavedTensor.get)
        self.bytes = 0

    def _pack(self, tensor: Tensor) -> _SavedTensor:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._weights:
            return _SavedTensor(tensor, lambda: None)
        self._holders[address] += 1
        if self._holders[address] == 1:
            self._now += size
            self.bytes = max(self.bytes, self._now)
        return _SavedTensor(tensor, lambda: self._release(address, size))

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self._now -= size

    def __enter__(self) -> ActivationMemory:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


class _SavedTensor:
    """The object that autograd saves in place of a tensor; calls ``on_release`` when it is dropped."""

    def __init__(self, tensor: Tensor, on_release: Callable[[], None]):
        self._tensor = (
            tensor.detach()
        )  # a saved output would otherwise reference its own graph: a cycle that is not freed
        self._on_release = on_release

    def get(self) -> Tensor:
        return self._tensor

    def __del__(self) -> None:
        self._on_release()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocation that failed; on a CPU torch raises a plain ``RuntimeError``."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device in bytes; ``None`` where it cannot be determined.

    On CUDA, PyTorch's reserved but unallocated memory counts as free. For other devices, the host's free memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _free_host_bytes(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def _free_host_bytes(meminfo: Path, groups: Path) -> int | None:
    """Free bytes of the machine or of this container, whichever is less; on macOS the total memory."""
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform == "darwin" else None
    found = [1024 * _number(meminfo, "MemAvailable:")]
    for limit, used, cache in _CGROUP_FILES:
        if (groups / limit).exists() and (most := (groups / limit).read_text().strip()) != "max":
            statistics = (groups / limit).with_name("memory.stat")
            found.append(int(most) - int((groups / used).read_text()) + _number(statistics, cache))
    return max(0, min(found))


def _number(path: Path, name: str) -> int:
    """The number on the line of a file that starts with ``name``; 0 where there is none."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(line[1]) for line in lines if line[0] == name), 0)
