"""Where a training run stands: enough to go on as if it had never stopped.

In: the loop's position, weights, optimizer memory and best weights so far. Out: the same as named tensors and JSON
facts, which ``RunFolder.save_state`` writes, and back.
Note: no random state is kept. The loop draws its randomness for each step from (seed, step), and the batches
theirs from (seed, epoch, index), so the position says it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clasp.training.precision import Precision
from clasp.types import SkippedSample


@dataclass(frozen=True, slots=True)
class TrainPosition:
    """The next step: its epoch, its number in the epoch, its number in the run; all from 0.

    ``step_in_epoch`` equal to the length of the epoch means that only the evaluation at its end is to do.
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
    """The evaluation that has gone best so far, and a copy of the selection at that moment (on the CPU)."""

    position: TrainPosition
    metrics: Mapping[str, float]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class TrainState:
    """All that the loop needs to go on exactly.

    ``weights`` and ``optimizer`` are the live tensors, not copies: write them before returning to the loop.
    ``precision`` and ``micro_batch`` (pairs in a piece, ``None`` before the first step) are kept because measuring
    them again might come out differently.
    """

    position: TrainPosition
    precision: Precision
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    best: BestEvaluation | None = None
    skipped: tuple[SkippedSample, ...] = ()
    micro_batch: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under one flat name: ``weights/NAME``, ``optimizer/NAME/SLOT``, ``best/NAME``."""
        parts = {"weights": self.weights, "optimizer": self.optimizer, "best": self.best.weights if self.best else {}}
        return {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}

    def metadata(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
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


def _as_list(position: TrainPosition) -> list[int]:
    return [position.epoch, position.step_in_epoch, position.step]


@dataclass(frozen=True, slots=True)
class FitResult:
    """What became of a call to ``fit``.

    The model holds the weights of ``weights_position``: the best evaluation's, or the last step's; ``metrics`` are what
    the evaluation said of them (empty when it was not asked). ``interrupted`` runs hold the last step's, and
    ``position`` is where to go on. ``pairs`` and ``seconds`` count this call only, ``seconds`` with evaluation and
    saving.
    """

    position: TrainPosition
    weights_position: TrainPosition
    interrupted: bool
    metrics: Mapping[str, float]
    precision: Precision
    pairs: int
    seconds: float
    skipped: tuple[SkippedSample, ...] = field(default=())
