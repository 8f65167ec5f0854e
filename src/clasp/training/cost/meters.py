"""What is read off the machine while a run goes on: its peak memory, its energy, and which machine it is.

In: a device. Out: numbers with a sentence each on how they were come by, or ``None`` with the reason why not.
Unusual: nothing is guessed. A peak that cannot be set back is no peak of this run; energy is what codecarbon says
(the extra ``energy``; offline, no files), with what of it was measured and what is codecarbon's own estimate.
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

_DEVICES_WITH_PEAK = ("cuda", "xpu")  # kinds of device whose allocator tells a peak that can be set back
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Measurement(NamedTuple):
    """A number, or ``None``, and how it was come by."""

    value: float | None
    method: str


# --- memory ----------------------------------------------------------------------------------------------------------


class PeakMemoryMeter:
    """The highest memory between each ``start`` and its ``stop``, in bytes.

    On a GPU that of PyTorch's tensors there, weights and all. On a CPU the resident size of this process beyond what it
    was at the first ``start``; pages of files that are mapped into memory (kept features) count while they are there.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._on_gpu = device.type in _DEVICES_WITH_PEAK
        self._why_not = "" if self._on_gpu else _why_no_peak(device)
        self._before: int | None = None
        self._highest: int | None = None

    def start(self) -> None:
        """Sets the peak back to what there is now."""
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
        """Reads it."""
        if self._why_not:
            return
        if self._on_gpu:
            highest = torch.get_device_module(self.device).max_memory_allocated(self.device)
        else:
            assert self._before is not None, "end comes after begin"
            highest = _status("VmHWM:") - self._before
        self._highest = max(self._highest or 0, highest)

    @property
    def measurement(self) -> Measurement:
        """The highest of all that was between a ``start`` and its ``stop``."""
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
    """Why no peak can be measured for work on a device that does not count; empty where one can."""
    if device.type != "cpu":
        return f"not measured: PyTorch tells no peak for {device.type}"
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return f"not measured: this system does not let the peak of a process be set back ({_CLEAR_REFS})"
    return ""


def _status(name: str) -> int:
    """Bytes on a line of the status of this process."""
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next(1024 * int(line[1]) for line in lines if line[0] == name)


def _trim_heap() -> None:
    """Hands memory that was freed back to the system: of what evaluation took, training would else seem to hold it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


# --- energy ----------------------------------------------------------------------------------------------------------

# What codecarbon's descriptions of the parts of a machine say about where their power comes from.
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
    """kWh of this process since ``start``, by codecarbon where that is installed. ``stop`` ends its threads."""

    def __init__(self) -> None:
        self._tracker: Any = None
        self._last = _LastEnergy()
        self._why_not = "not measured: nothing has begun"

    def start(self) -> None:
        """Begins to measure; the first time in a process, codecarbon looks at the machine for some two seconds."""
        try:
            codecarbon = import_module("codecarbon")
        except ImportError as error:
            self._why_not = f"not measured: {error}; {_INSTALL_HINT}"
            return
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it speaks before it looks at its log_level
        self._tracker = codecarbon.OfflineEmissionsTracker(
            tracking_mode="process",
            output_methods=[],
            output_handlers=[self._last],
            # a user's configuration must not send anything anywhere, nor ask for the carbon of a place
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
        """Up to now, or to ``stop``: kWh, and for each part of the machine whether they were measured."""
        if self._tracker is not None:
            self._tracker.flush()
            # the one thing that codecarbon tells only inside
            self._last.parts = [part.description() for part in self._tracker._hardware]
        if self._last.energy is None:
            return Measurement(None, self._why_not)
        version = importlib.metadata.version("codecarbon")
        said = "; ".join(_describe_part(part) for part in self._last.parts)
        return Measurement(self._last.energy.energy_consumed, f"codecarbon {version}, of this process: {said}")


class _LastEnergy:
    """Takes what codecarbon gives out, in place of a file."""

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
    """A part of the machine as codecarbon describes it, and where its power comes from."""
    kind = part.partition("(")[0]
    for word, how in _MEASURED.items():
        if word in part:
            return f"{kind} {how}"
    return f"{kind} {_ESTIMATED.get(kind, f'as codecarbon has it ({part})')}"


# --- which machine ---------------------------------------------------------------------------------------------------


def describe_machine(device: torch.device, precision: str) -> dict[str, Any]:
    """What the figures of a run belong to. ``cores`` are those that this process may use, ``threads`` PyTorch's."""
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
