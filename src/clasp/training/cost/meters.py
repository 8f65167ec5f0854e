"""Hardware meters: peak memory, energy, and a description of the machine.

Input: a device. Output: numbers, each with a sentence on how it was measured, or ``None`` with the reason. Note:
nothing is guessed. A peak that cannot be reset is not reported as that of this run; energy is codecarbon's figure (the
extra ``energy``; offline, no files), with which parts of it were measured and which are codecarbon's estimates.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import platform
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

_INSTALL_HINT = 'pip install "clasp-vl[energy]"'

_DEVICES_WITH_PEAK = ("cuda", "xpu")  # device types whose allocator has a resettable peak
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Measurement(NamedTuple):
    """A number, or ``None``, and how it was measured."""

    value: float | None
    method: str


# --- memory ----------------------------------------------------------------------------------------------------------


class PeakMemoryMeter:
    """Peak memory between each ``start`` and its ``stop``, in bytes.

    On a GPU, of PyTorch's tensors, weights included. On a CPU, the resident set size of this process beyond that at the
    first ``start``; resident pages of memory-mapped files (cached features) count.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._on_gpu = device.type in _DEVICES_WITH_PEAK
        self._why_not = "" if self._on_gpu else _why_no_peak(device)
        self._before: int | None = None
        self._highest: int | None = None

    def start(self) -> None:
        """Resets the peak to the current usage."""
        if self._why_not:
            return
        if self._on_gpu:
            torch.get_device_module(self.device).reset_peak_memory_stats(self.device)
            return
        _trim_heap()
        _CLEAR_REFS.write_text("5")
        if self._before is None:
            self._before = _status("VmRSS:")

    def stop(self) -> None:
        """Reads the peak."""
        if self._why_not:
            return
        if self._on_gpu:
            highest = torch.get_device_module(self.device).max_memory_allocated(self.device)
        else:
            assert self._before is not None, "stop is called after start"
            highest = _status("VmHWM:") - self._before
        self._highest = max(self._highest or 0, highest)

    @property
    def measurement(self) -> Measurement:
        """The maximum over all intervals between ``start`` and ``stop``."""
        if self._why_not or self._highest is None:
            return Measurement(None, self._why_not or "not measured: nothing was trained")
        if self._on_gpu:
            return Measurement(
                self._highest, f"PyTorch's tensors on {self.device.type} while training, weights and all"
            )
        return Measurement(
            self._highest,
            "this process while training, resident, above what it was before; with mapped files, without data workers",
        )


def _why_no_peak(device: torch.device) -> str:
    """Why no peak can be measured on a device without allocator statistics; empty where it can."""
    if device.type != "cpu":
        return f"not measured: PyTorch tells no peak for {device.type}"
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return f"not measured: this system does not let the peak of a process be set back ({_CLEAR_REFS})"
    return ""


def _status(name: str) -> int:
    """Bytes of an entry of this process's ``/proc`` status."""
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next(1024 * int(line[1]) for line in lines if line[0] == name)


def _trim_heap() -> None:
    """Returns freed memory to the system, so that memory used by evaluation is not attributed to training."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


# --- energy ----------------------------------------------------------------------------------------------------------

# Source of the power figure, by a substring of codecarbon's description of a hardware part.
_MEASURED = {
    "Intel Rapl": "measured by RAPL (the whole package)",
    "Windows Emi": "measured by RAPL (the whole package)",
    "Power Gadget": "measured by Intel Power Gadget (the whole package)",
    "GPU": "measured by its driver (NVML or AMD SMI; the whole card)",
    "AppleSiliconChip": "measured by powermetrics (the whole chip)",
    "Raspberry": "measured by its power controller",
}
_ESTIMATED = {"CPU": "estimated from its load and TDP", "RAM": "estimated from its size"}


class EnergyMeter:
    """Energy of this process since ``start`` in kWh, by codecarbon if installed. ``stop`` ends its threads."""

    def __init__(self) -> None:
        self._tracker: Any = None
        self._last = _LastEnergy()
        self._why_not = "not measured: nothing has begun"

    def start(self) -> None:
        """Starts measuring; the first call in a process takes about two seconds, in which codecarbon inspects the
        machine."""
        try:
            codecarbon = import_module("codecarbon")
        except ImportError as error:
            self._why_not = f"not measured: {error}; {_INSTALL_HINT}"
            return
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it logs before it applies its log_level
        self._tracker = codecarbon.OfflineEmissionsTracker(
            tracking_mode="process",
            output_methods=[],
            output_handlers=[self._last],
            # overrides a user's configuration: no network access for emissions or carbon intensity
            emissions_endpoint=False,
            electricitymaps_api_token="",
            force_carbon_intensity_g_co2e_kwh=0,
            api_call_interval=-1,
            allow_multiple_runs=True,
            log_level="critical",
        )
        self._tracker.start()
        self._why_not = "not measured: codecarbon gave no figure"

    def stop(self) -> None:
        if self._tracker is not None:
            self._tracker.stop()
            self._tracker = None

    @property
    def measurement(self) -> Measurement:
        """kWh up to now, or to ``stop``, and for each hardware part whether they were measured."""
        if self._tracker is not None:
            self._tracker.flush()
            # only available from a private attribute of codecarbon
            self._last.parts = [part.description() for part in self._tracker._hardware]
        if self._last.energy is None:
            return Measurement(None, self._why_not)
        version = importlib.metadata.version("codecarbon")
        sources = "; ".join(_describe_part(part) for part in self._last.parts)
        return Measurement(self._last.energy.energy_consumed, f"codecarbon {version}, of this process: {sources}")


class _LastEnergy:
    """An output handler of codecarbon that stores the last figure."""

    energy: Any = None
    parts: tuple[str, ...] | list[str] = ()

    def out(self, total: Any, delta: Any) -> None:
        self.energy = total

    def live_out(self, total: Any, delta: Any) -> None:
        pass

    def task_out(self, data: Any, experiment_name: str) -> None:
        pass

    def exit(self) -> None:
        pass


def _describe_part(part: str) -> str:
    """A hardware part as described by codecarbon, and the source of its power figure."""
    kind = part.partition("(")[0]
    for word, source in _MEASURED.items():
        if word in part:
            return f"{kind} {source}"
    return f"{kind} {_ESTIMATED.get(kind, f'as codecarbon has it ({part})')}"


# --- machine ---------------------------------------------------------------------------------------------------------


def describe_machine(device: torch.device, precision: str) -> dict[str, Any]:
    """The machine of a measurement. ``cores``: those this process may use; ``threads``: PyTorch's."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "precision": precision,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
