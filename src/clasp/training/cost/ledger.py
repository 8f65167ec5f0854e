"""Cost accounting of a run: ``cost.json`` in its folder, and the ``CostLedger`` that measures it during training.

Input: the stages and steps of a run, and one batch to count FLOPs on. Output: ``RunCost``: parameters, FLOPs per pair,
peak memory, pairs per second, seconds by stage, energy, delta bytes, machine; ``read_cost`` reads it back. Note: each
start of a run is a session, and a run costs the sum of its sessions; work of a killed session after its last checkpoint
is lost. FLOPs are counted while the first step computes its gradient, which moves no bit of it; that step is a little
slower than the others, of which the median is the pairs per second.
"""

from __future__ import annotations

import json
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from clasp.training.cost import COST_FILE
from clasp.training.cost.flops import FLOPS_CONVENTION, FlopCounter
from clasp.training.cost.meters import EnergyMeter, PeakMemoryMeter, describe_machine
from clasp.training.step import Stepper, StepResult
from clasp.types import Batch, UserError

_FORMAT = 1

Stage = Literal["features", "training", "evaluation", "saving", "counting"]
_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class FrozenFlops:
    """FLOPs of the frozen part of a tower for one input, where its features are cached."""

    flops: int
    what: str


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of one step over ``pairs`` pairs in micro-batches of ``micro_batch``.

    ``forward`` includes recomputation for the backward pass. ``left_out`` are operations without a FLOP formula.
    """

    forward: int
    backward: int
    pairs: int
    micro_batch: int
    left_out: tuple[str, ...]
    counted: str = FLOPS_CONVENTION


@dataclass(frozen=True, slots=True)
class CostSession:
    """The cost of one start of a run, up to its end, its interruption or its last checkpoint.

    ``steps`` counts from ``first_step`` (0-based). ``pairs_per_second`` is the median over the steps, without waiting
    for data; ``step_seconds`` is the time of the steps alone. ``seconds`` is by stage, without overlap; ``rest`` is the
    time outside all stages. ``peak`` and ``energy`` describe the measurement, or why there is none.
    """

    first_step: int
    steps: int
    pairs: int
    pairs_per_second: float | None
    step_seconds: float
    seconds: Mapping[str, float]
    peak_bytes: int | None
    peak: str
    energy_kwh: float | None
    energy: str
    machine: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunCost:
    """The cost of a run so far. ``parameters``: total and trained, by part; the whole is ``model``.

    ``work`` is ``None`` before the first step. ``once`` has the towers with cached features, by modality: their cost is
    not included in ``work``. ``delta_bytes`` is ``None`` while there is no delta.
    """

    parameters: Mapping[str, Mapping[str, int]]
    work: StepFlops | None
    once: Mapping[str, FrozenFlops]
    delta_bytes: int | None
    sessions: tuple[CostSession, ...]

    @property
    def forward_flops(self) -> float | None:
        """FLOPs per pair in a training step."""
        return None if self.work is None else self.work.forward / self.work.pairs

    @property
    def backward_flops(self) -> float | None:
        """FLOPs per pair in a training step."""
        return None if self.work is None else self.work.backward / self.work.pairs

    @property
    def peak_bytes(self) -> int | None:
        """The maximum over sessions; ``None`` where it was not measured in one of them."""
        peaks = [session.peak_bytes for session in self.sessions]
        return None if None in peaks else max((peak for peak in peaks if peak is not None), default=None)

    @property
    def energy_kwh(self) -> float | None:
        """The sum over sessions; ``None`` where it was not measured in one of them."""
        spent = [session.energy_kwh for session in self.sessions]
        return None if None in spent or not spent else sum(kwh for kwh in spent if kwh is not None)

    @property
    def pairs_per_second(self) -> float | None:
        """The median over sessions, weighted by their steps."""
        measured = [(one.pairs_per_second, one.steps) for one in self.sessions if one.pairs_per_second is not None]
        remaining = sum(steps for _, steps in measured) / 2
        for rate, steps in sorted(measured):
            remaining -= steps
            if remaining <= 0:
                return rate
        return None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, summed over sessions."""
        stages = dict.fromkeys(stage for session in self.sessions for stage in session.seconds)
        return {stage: sum(session.seconds.get(stage, 0.0) for session in self.sessions) for stage in stages}

    def __str__(self) -> str:
        work = None if self.work is None else (self.work.forward + self.work.backward) / self.work.pairs
        rate = self.pairs_per_second
        parts = [
            "" if work is None else f"{format_si(work, 'FLOP')} a pair",
            "peak not measured" if self.peak_bytes is None else f"peak {format_si(self.peak_bytes, 'B')}",
            "" if rate is None else f"{rate:,.3g} pairs/s" if rate < 100 else f"{rate:,.0f} pairs/s",
            f"{sum(self.seconds.values()):,.0f} s",
            "" if self.energy_kwh is None else f"{1000 * self.energy_kwh:.3g} Wh",
        ]
        return ", ".join(filter(None, parts))

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``cost.json``; ``sum`` is derived from the rest, for readers of the file alone."""
        whole = self.parameters["model"]
        summary = {
            "sessions": len(self.sessions),
            "steps": sum(session.steps for session in self.sessions),
            "pairs": sum(session.pairs for session in self.sessions),
            "trained_parameters": whole["trained"],
            "total_parameters": whole["total"],
            "forward_flops_per_pair": self.forward_flops,
            "backward_flops_per_pair": self.backward_flops,
            "peak_bytes": self.peak_bytes,
            "pairs_per_second": self.pairs_per_second,
            "seconds": self.seconds,
            "energy_kwh": self.energy_kwh,
            "delta_bytes": self.delta_bytes,
        }
        return {"format": _FORMAT, "sum": summary, **asdict(self)}

    def metrics(self) -> dict[str, float | int]:
        """The sums that are known, as a tracker gets them: ``cost/peak_bytes``, ``cost/seconds/training``."""
        sums = self.to_dict()["sum"]
        stages = {f"seconds/{stage}": spent for stage, spent in sums.pop("seconds").items()}
        return {f"cost/{name}": value for name, value in {**sums, **stages}.items() if value is not None}

    def to_json(self) -> str:
        """The text of ``cost.json``."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> RunCost:
        """The inverse of ``to_dict``, by way of JSON."""
        return cls(
            facts["parameters"],
            None
            if facts["work"] is None
            else StepFlops(**{**facts["work"], "left_out": tuple(facts["work"]["left_out"])}),
            {side: FrozenFlops(**once) for side, once in facts["once"].items()},
            facts["delta_bytes"],
            tuple(CostSession(**session) for session in facts["sessions"]),
        )


def read_cost(run: str | Path) -> RunCost:
    """The cost of a run. Raises ``UserError`` where ``cost.json`` is missing or damaged."""
    file = Path(run) / COST_FILE
    if not file.exists():
        raise UserError(f"{run} has no {COST_FILE}: it is not a run, or was trained before costs were recorded")
    try:
        return RunCost.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error!r}); delete it: nothing else of the run depends on it") from None


def format_si(value: float | int, unit: str) -> str:
    """Three significant digits with an SI prefix: ``12.3 GFLOP``, ``84 B``."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{value:.0f} {unit}"


class CostLedger:
    """Measures the cost of one session of a run on ``device``; a context manager around the session.

    ``earlier`` is the cost of previous sessions, ``first_step`` the step at which this one resumes.
    """

    def __init__(
        self,
        device: torch.device,
        parameters: Mapping[str, Mapping[str, int]],
        *,
        first_step: int = 0,
        earlier: RunCost | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.once: Mapping[str, FrozenFlops] = {}
        self._device, self._parameters, self._first_step, self._clock = device, parameters, first_step, clock
        self._work = earlier.work if earlier else None
        self._earlier = earlier.sessions if earlier else ()
        self._seconds: dict[str, float] = {"features": 0.0, "training": 0.0, "evaluation": 0.0}
        self._stages: list[Stage] = []
        self._started = self._charged_until = clock()
        self._rates, self._pairs, self._step_seconds = array("d"), 0, 0.0
        self._peak, self._energy, self._precision = PeakMemoryMeter(device), EnergyMeter(), ""

    def __enter__(self) -> CostLedger:
        self._energy.start()
        self._started = self._clock()
        return self

    def __exit__(self, *error: object) -> None:
        self._energy.stop()

    # --- stages --------------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Attributes time inside to this stage, except that of nested stages; peak memory is measured in training."""
        outer = self._stages[-1] if self._stages else None
        self._charge_stage()
        if outer == "training":
            self._peak.stop()
        self._stages.append(name)
        if name == "training":
            self._peak.start()
        try:
            yield
        finally:
            self._charge_stage()
            if name == "training":
                self._peak.stop()
            self._stages.pop()
            if outer == "training":
                self._peak.start()

    def timed_as(self, name: Stage, call: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
        """The same function, its calls attributed to a stage."""

        def timed(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
            with self.stage(name):
                return call(*args, **kwargs)

        return timed

    def time_features(self, bar: Callable[[str], AbstractContextManager[_Result]]) -> Callable[[str], Any]:
        """The same progress bar, the time inside attributed to features."""

        @contextmanager
        def timed(title: str) -> Iterator[_Result]:
            with self.stage("features"), bar(title) as progress:
                yield progress

        return timed

    def _charge_stage(self) -> None:
        now = self._clock()
        if self._stages:
            stage = self._stages[-1]
            self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._charged_until
        self._charged_until = now

    # --- steps ---------------------------------------------------------------------------------------------------

    def time_step(self, stepper: Stepper, batch: Batch, number: int) -> StepResult:
        """Runs and times step ``number``; counts the FLOPs of its gradient, unless those of a step were counted before.

        A step that ran out of memory, and was computed again in smaller pieces, is not counted.
        """
        planned, counter = stepper.micro_batch, FlopCounter() if self._work is None else None
        started = self._clock()
        result = stepper.step(batch, number, around_gradient=counter)
        seconds = max(self._clock() - started, 1e-9)
        if counter is not None and stepper.micro_batch == planned:
            pairs, flops = len(batch.ids), counter.flops
            pieces = min(planned or pairs, pairs)
            self._work = StepFlops(flops.forward, flops.backward, pairs, pieces, flops.left_out)
        self._rates.append(batch.total_pairs / seconds)
        self._pairs += batch.total_pairs
        self._step_seconds += seconds
        self._precision = stepper.precision
        return result

    # --- result --------------------------------------------------------------------------------------------------

    def cost(self, delta_bytes: int | None = None) -> RunCost:
        """The cost of this session so far and of the earlier ones."""
        self._charge_stage()
        wall = self._clock() - self._started
        seconds = {**self._seconds, "rest": max(0.0, wall - sum(self._seconds.values()))}
        peak, energy = self._peak.measurement, self._energy.measurement
        session = CostSession(
            first_step=self._first_step,
            steps=len(self._rates),
            pairs=self._pairs,
            pairs_per_second=statistics.median(self._rates) if self._rates else None,
            step_seconds=self._step_seconds,
            seconds=seconds,
            peak_bytes=None if peak.value is None else int(peak.value),
            peak=peak.method,
            energy_kwh=energy.value,
            energy=energy.method,
            machine=describe_machine(self._device, self._precision),
        )
        return RunCost(self._parameters, self._work, self.once, delta_bytes, (*self._earlier, session))
