"""The state of a training run: everything needed for an exact resume.

Input: the loop's position, weights, optimizer state and best weights so far. Output: named tensors and JSON metadata,
which ``RunFolder.save_state`` writes, and back. Note: no RNG state is saved. The loop seeds each step from (seed,
step), and the batches are derived from (seed, epoch, index), so the position determines all randomness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from clasp.plain_types import Precision
from clasp.types import SkippedSample


@dataclass(frozen=True, slots=True)
class TrainPosition:
    """The next step: its epoch, its number in the epoch and in the run; all from 0.

    ``step_in_epoch`` equal to the epoch's number of steps means that only its final evaluation remains.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0

    def next_step(self) -> TrainPosition:
        return TrainPosition(self.epoch, self.step_in_epoch + 1, self.step + 1)

    def next_epoch(self) -> TrainPosition:
        return TrainPosition(self.epoch + 1, 0, self.step)


@dataclass(frozen=True, slots=True)
class BestEvaluation:
    """The best evaluation so far, and a CPU copy of the trained parameters at that step."""

    position: TrainPosition
    metrics: Mapping[str, float]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything that the loop needs for an exact resume.

    ``weights`` and ``optimizer`` are the live tensors, not copies: write them before returning to the loop.
    ``precision`` and ``micro_batch`` (pairs per micro-batch, ``None`` before the first step) are saved because
    measuring them again might give other values.
    """

    position: TrainPosition
    precision: Precision
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    best: BestEvaluation | None = None
    skipped: tuple[SkippedSample, ...] = ()
    micro_batch: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under flat names: ``weights/NAME``, ``optimizer/NAME/SLOT``, ``best/NAME``."""
        parts = {"weights": self.weights, "optimizer": self.optimizer, "best": self.best.weights if self.best else {}}
        return {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}

    def metadata(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        best = {"position": _as_list(self.best.position), "metrics": dict(self.best.metrics)} if self.best else None
        return {
            "position": _as_list(self.position),
            "precision": self.precision,
            "micro_batch": self.micro_batch,
            "best": best,
            "skipped": [list(sample) for sample in self.skipped],
        }

    @classmethod
    def from_tensors(cls, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TrainState:
        """The inverse of ``metadata`` and ``tensors``."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "best": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        best = metadata["best"]
        return cls(
            position=TrainPosition(*metadata["position"]),
            precision=metadata["precision"],
            weights=parts["weights"],
            optimizer=parts["optimizer"],
            best=BestEvaluation(TrainPosition(*best["position"]), best["metrics"], parts["best"]) if best else None,
            skipped=tuple(SkippedSample(*sample) for sample in metadata["skipped"]),
            micro_batch=metadata["micro_batch"],
        )


def copies_in_state(select: Literal["best", "last"], *, stepped: bool) -> int:
    """How many numbers a state has for each trained one: its weight, the best one where the best are selected, and two
    moments of AdamW once there was a step."""
    return 1 + (select == "best") + 2 * stepped


def _as_list(position: TrainPosition) -> list[int]:
    return [position.epoch, position.step_in_epoch, position.step]


@dataclass(frozen=True, slots=True)
class FitResult:
    """The result of a call to ``fit``.

    The model has the weights of ``weights_position``: the best evaluation's, or the last step's; ``metrics`` are those
    of their evaluation (empty without one), ``evaluation`` its number among those of this call, from 0 (``None`` where
    it is of an earlier call, or there is none). ``interrupted`` runs have the last step's, and ``position`` is where to
    resume. ``pairs`` and ``seconds`` count this call only, ``seconds`` including evaluation and saving.
    """

    position: TrainPosition
    weights_position: TrainPosition
    interrupted: bool
    metrics: Mapping[str, float]
    precision: Precision
    pairs: int
    seconds: float
    evaluation: int | None = None
    skipped: tuple[SkippedSample, ...] = field(default=())
