"""Memory, measured: what is free, and what a piece of work keeps for its backward pass.

In: a device; or some work, done inside ``ActivationMemory``. Out: bytes.
Unusual: nothing is estimated from the shape of a model. The autograd engine is asked what it keeps, and the operating
system what it has left, within the limit that a container may have set.
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

# The limit on the processes of this container, what they use, and the line of the statistics that says how much of that
# is only a copy of files: control groups in their second and in their first version.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


class ActivationMemory:
    """A context that counts the ``bytes`` kept for the backward pass of what runs inside: the most at one time.

    ``weights`` are there anyway and do not count. What a tensor is cut from counts whole, since it is kept whole, and
    once however many tensors are cut from it.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._holders: Counter[int] = Counter()  # of the storage at an address, which is another's once it is let go
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
    """What the autograd engine keeps in place of a tensor, and says when it no longer does."""

    def __init__(self, tensor: Tensor, let_go: Callable[[], None]):
        self._tensor = tensor.detach()  # an output kept as it is would hold its own graph, and neither be freed
        self._let_go = let_go

    def get(self) -> Tensor:
        return self._tensor

    def __del__(self) -> None:
        self._let_go()


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a computation on a device may still take; ``None`` where nothing tells.

    What PyTorch holds in reserve on a GPU counts as free. On anything but a GPU with memory of its own, the machine's.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _free_host_bytes(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def _free_host_bytes(meminfo: Path, groups: Path) -> int | None:
    """Of the machine or of this container, whichever has less left; a Mac tells only how much there is in all."""
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform == "darwin" else None
    found = [1024 * _number(meminfo, "MemAvailable:")]
    for limit, used, files in _CGROUP_FILES:
        if (groups / limit).exists() and (most := (groups / limit).read_text().strip()) != "max":
            statistics = (groups / limit).with_name("memory.stat")
            found.append(int(most) - int((groups / used).read_text()) + _number(statistics, files))
    return max(0, min(found))


def _number(path: Path, name: str) -> int:
    """The number on the line of a file that begins with a name; 0 where there is none."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(line[1]) for line in lines if line[0] == name), 0)
