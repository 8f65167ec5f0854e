"""What a run cost: the ``cost.json`` of its folder, and the ``CostLedger`` that is kept while it runs.

In: the stages of a run, its steps, one batch to count on. Out: ``RunCost``: parameters, FLOPs of a pair, peak memory,
pairs a second, seconds of each stage, energy, bytes of the delta, the machine; ``read_cost`` gives it back.
Unusual: each start of a run is a session of its own, and a run costs the sum of them; what a killed one did after its
last saving is in none. FLOPs are counted by computing the gradient of the first batch once more, right after its step
was taken and outside of every clock: nothing of it is kept, so a run ends in the same bits with a ledger and without.
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

from clasp.training.cost.flops import FLOPS_CONVENTION, count_flops
from clasp.training.cost.meters import EnergyMeter, PeakMemoryMeter, describe_machine
from clasp.training.step import Stepper, StepResult
from clasp.types import Batch, UserError

COST_FILE, _FORMAT = "cost.json", 1

Stage = Literal["features", "training", "evaluation", "saving", "counting"]
_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class FrozenFlops:
    """What the frozen part of a tower takes for one input, where it is computed once and kept."""

    flops: int
    what: str


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of one step over ``pairs`` pairs, worked through ``micro_batch`` at a time.

    ``forward`` has what is computed again for the backward pass. ``left_out`` are operations without a formula.
    """

    forward: int
    backward: int
    pairs: int
    micro_batch: int
    left_out: tuple[str, ...]
    counted: str = FLOPS_CONVENTION


@dataclass(frozen=True, slots=True)
class CostSession:
    """What one start of a run cost, up to its end, its stop or its last saving.

    ``steps`` from ``first_step`` (from 0) on. ``pairs_per_second`` is the median over the steps, without the wait for
    data; ``step_seconds`` are those of the steps alone. ``seconds`` are by stage, each of one stage only, and ``rest``
    is what no stage has. ``peak`` and ``energy`` say how the numbers were come by, or why there are none.
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
    """What a run cost so far. ``parameters`` in all and trained, by part, the whole being ``model``.

    ``work`` is ``None`` before a first step. ``once`` has the towers whose frozen part is kept, by modality: what it
    takes is not in ``work``. ``delta_bytes`` is ``None`` while there is no delta.
    """

    parameters: Mapping[str, Mapping[str, int]]
    work: StepFlops | None
    once: Mapping[str, FrozenFlops]
    delta_bytes: int | None
    sessions: tuple[CostSession, ...]

    @property
    def forward_flops(self) -> float | None:
        """Of a pair, in a training step."""
        return None if self.work is None else self.work.forward / self.work.pairs

    @property
    def backward_flops(self) -> float | None:
        """Of a pair, in a training step."""
        return None if self.work is None else self.work.backward / self.work.pairs

    @property
    def peak_bytes(self) -> int | None:
        """The highest of all sessions; ``None`` where one of them could not tell."""
        peaks = [session.peak_bytes for session in self.sessions]
        return None if None in peaks else max((peak for peak in peaks if peak is not None), default=None)

    @property
    def energy_kwh(self) -> float | None:
        """The sum of all sessions; ``None`` where one of them could not tell."""
        spent = [session.energy_kwh for session in self.sessions]
        return None if None in spent or not spent else sum(kwh for kwh in spent if kwh is not None)

    @property
    def pairs_per_second(self) -> float | None:
        """The median of its session; of several sessions the one in which half of all steps have been slower."""
        known = [(each.pairs_per_second, each.steps) for each in self.sessions if each.pairs_per_second is not None]
        left = sum(steps for _, steps in known) / 2
        for rate, steps in sorted(known):
            left -= steps
            if left <= 0:
                return rate
        return None

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, the sum of all sessions."""
        stages = dict.fromkeys(stage for session in self.sessions for stage in session.seconds)
        return {stage: sum(session.seconds.get(stage, 0.0) for session in self.sessions) for stage in stages}

    def __str__(self) -> str:
        work = None if self.work is None else (self.work.forward + self.work.backward) / self.work.pairs
        rate = self.pairs_per_second
        said = [
            "" if work is None else f"{format_si(work, 'FLOP')} a pair",
            "peak not measured" if self.peak_bytes is None else f"peak {format_si(self.peak_bytes, 'B')}",
            "" if rate is None else f"{rate:,.3g} pairs/s" if rate < 100 else f"{rate:,.0f} pairs/s",
            f"{sum(self.seconds.values()):,.0f} s",
            "" if self.energy_kwh is None else f"{1000 * self.energy_kwh:.3g} Wh",
        ]
        return ", ".join(filter(None, said))

    def to_dict(self) -> dict[str, Any]:
        """As ``cost.json`` has it: ``sum`` is made of the rest, for whoever reads the file alone."""
        whole = self.parameters["model"]
        together = {
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
        return {"format": _FORMAT, "sum": together, **asdict(self)}

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
    """What a run cost. Raises ``UserError`` where it has not been written down, or is damaged."""
    file = Path(run) / COST_FILE
    if not file.exists():
        raise UserError(f"{run} has no {COST_FILE}: no run, or one that was trained before costs were kept")
    try:
        return RunCost.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error!r}); delete it: nothing else of the run depends on it") from None


def format_si(value: float | int, unit: str) -> str:
    """Three digits and the prefix that goes with them: ``12.3 GFLOP``, ``84 B``."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{value:.0f} {unit}"


class CostLedger:
    """Keeps the costs of one session of a run on ``device``; as a context it lasts as long as the session.

    ``earlier`` is what the sessions before it cost, ``first_step`` where this one goes on.
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
        self._began = self._charged_until = clock()
        self._rates, self._pairs, self._step_seconds = array("d"), 0, 0.0
        self._peak, self._energy, self._precision = PeakMemoryMeter(device), EnergyMeter(), ""

    def __enter__(self) -> CostLedger:
        self._energy.start()
        self._began = self._clock()
        return self

    def __exit__(self, *error: object) -> None:
        self._energy.stop()

    # --- stages --------------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """What runs inside is of this stage, unless it is of another one inside; memory is looked at in training."""
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
        """The same function, its calls being of a stage."""

        def called(*given: _Params.args, **options: _Params.kwargs) -> _Result:
            with self.stage(name):
                return call(*given, **options)

        return called

    def time_features(self, bar: Callable[[str], AbstractContextManager[_Result]]) -> Callable[[str], Any]:
        """The same bar, under which features are computed."""

        @contextmanager
        def shown(title: str) -> Iterator[_Result]:
            with self.stage("features"), bar(title) as progress:
                yield progress

        return shown

    def _charge_stage(self) -> None:
        now = self._clock()
        if self._stages:
            stage = self._stages[-1]
            self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._charged_until
        self._charged_until = now

    # --- steps ---------------------------------------------------------------------------------------------------

    def time_step(self, stepper: Stepper, batch: Batch, number: int) -> StepResult:
        """Takes step ``number``, and its time."""
        began = self._clock()
        done = stepper.step(batch, number)
        seconds = max(self._clock() - began, 1e-9)
        self._rates.append(len(batch.ids) / seconds)
        self._pairs += len(batch.ids)
        self._step_seconds += seconds
        self._precision = stepper.precision
        return done

    def count_step_flops(self, stepper: Stepper, batch: Batch, number: int) -> None:
        """Counts the FLOPs of step ``number``, which has just been taken, unless they are known of an earlier one.

        The gradient is computed once more and let go of. Seeded and drawn from as in the step, generators end where
        they were; weights are put back, since a forward pass may put a temperature into its bounds.
        """
        if self._work is not None:
            return
        with self.stage("counting"):
            weights = stepper.selected_weights(copied=True)
            flops = count_flops(lambda: stepper.backward(batch, number))
            stepper.optimizer.zero_grad()
            stepper.load_weights(weights)
        pairs = len(batch.ids)
        self._work = StepFlops(
            flops.forward, flops.backward, pairs, min(stepper.micro_batch or pairs, pairs), flops.left_out
        )

    # --- what came of it -----------------------------------------------------------------------------------------

    def cost(self, delta_bytes: int | None = None) -> RunCost:
        """Of this session up to now and of those before it."""
        self._charge_stage()
        wall = self._clock() - self._began
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
