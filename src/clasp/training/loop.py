"""The training loop on one screen: fetch, encode, loss, step, log, evaluate, save.

In: a model that turns a batch into embeddings, a stream of batches, a loss, settings. Out: the model trained in place,
and ``FitResult``; on the way dicts to ``log``, states to ``save``, a bar to ``reporter``.
Unusual: it knows protocols only. A run that stops after any step and goes on from the state saved there ends in the
same bits as one that never stopped, since the position is the whole of the random state (``train.state``); on a GPU,
as far as its kernels repeat themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from accelerate import Accelerator

from clasp.training.cost.ledger import CostLedger
from clasp.training.interrupt import GracefulStop
from clasp.training.precision import PrecisionChoice, resolve_precision
from clasp.training.settings import TrainPlan, TrainSettings, plan_training
from clasp.training.state import BestEvaluation, FitResult, TrainPosition, TrainState
from clasp.training.step import Stepper, Trainable
from clasp.training.trackers.console import Reporter, SilentReporter
from clasp.training.trackers.jsonl import LogFunction, RunLogger
from clasp.types import Batch, Loss

__all__ = [
    "BatchStream",
    "FitResult",
    "TrainPlan",
    "TrainPosition",
    "TrainSettings",
    "TrainState",
    "Trainable",
    "fit",
    "plan_training",
]

_EVALUATIONS_PER_RUN = 10

_EvaluateFunction = Callable[[], Mapping[str, float]]


@runtime_checkable
class BatchStream(Protocol):
    """Batches by epoch: always ``len`` of them, the same whenever that epoch is asked for.

    ``start`` leaves out as many from the beginning, all of them at ``len``, where only the evaluation is left to do.
    A batch may be short, or empty, where samples could not be read.
    """

    def __len__(self) -> int: ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]: ...


def fit(
    model: Trainable,
    batches: BatchStream,
    loss: Loss,
    settings: TrainSettings,
    *,
    log: LogFunction,
    evaluate: _EvaluateFunction | None = None,
    primary: str = "",
    save: Callable[[TrainState], None] | None = None,
    resume_state: TrainState | None = None,
    kinds: Mapping[str, str] = {},
    reporter: Reporter | None = None,
    ledger: CostLedger | None = None,
) -> FitResult:
    """Trains the selection in place; leaves the model in eval mode, on the device that it was trained on.

    ``log`` gets JSON dicts told apart by ``event``: start, pieces, step, skipped, evaluation, stop. ``evaluate`` is
    called with the model in eval mode; ``primary`` names the metric in its answer that decides, greater being
    better. ``save`` gets the state every ``save_every_minutes``, on Ctrl-C or SIGTERM, and at the end; a run that is
    given it as ``resume_state`` goes on there. ``kinds`` has the kind of each parameter that trains, a key of
    ``lr_factors``; where it is empty, all have one learning rate. ``ledger`` is told of every step. Raises UserError
    when the loss or its gradient is not finite, before the step that would have spoilt the weights, and when
    ``resume_state`` is of a run that trains something else.
    """
    assert settings.epochs != "auto", "resolve the settings with plan_training first"
    epochs, steps = settings.epochs, settings.epochs * len(batches)
    began = saved = time.monotonic()
    # Autocast is ours to apply (train.step): accelerate allows one precision in the life of a process, and its
    # `prepare` would leave a wrapper on the model's forward. It brings the device, and later the other processes.
    accelerator = Accelerator(mixed_precision="no")
    device = accelerator.device
    numbers = (
        PrecisionChoice(resume_state.precision, "as before the stop")
        if resume_state
        else resolve_precision(settings.precision, device)
    )
    stepper = Stepper(
        model, loss, settings, accelerator, numbers.precision, steps=steps, kinds=kinds, resume_state=resume_state
    )
    at = resume_state.position if resume_state else TrainPosition()
    skipped = resume_state.skipped if resume_state else ()
    journal = RunLogger(
        log, reporter or SilentReporter(), steps=steps, epochs=epochs, log_every=settings.log_every, skipped=skipped
    )
    judge = BestCheckpoint(
        stepper, journal, evaluate, primary, settings, epochs, resume_state.best if resume_state else None
    )

    def state() -> TrainState:
        weights, memory, skipped = (
            stepper.selected_weights(),
            stepper.optimizer_state(),
            tuple(journal.skipped.values()),
        )
        return TrainState(at, numbers.precision, weights, memory, judge.best, skipped, stepper.micro_batch)

    with GracefulStop() as stop, journal:
        line = f"computing in {numbers.precision} on {device.type}: {numbers.reason}"
        journal.log_event(
            "start", line, step=at.step, steps=steps, epochs=epochs, device=str(device), **numbers._asdict()
        )
        model.train()
        if resume_state is None:
            judge.evaluate_initial(at)
        while at.epoch < epochs and not stop.requested:
            for batch in journal.time_batches(batches.epoch(at.epoch, start=at.step_in_epoch)):
                journal.log_skipped(batch)
                if len(batch.ids) > 1:  # fewer have nothing to be told apart from
                    _train_step(stepper, journal, ledger, batch, at)
                at = at.next_step()
                if save and time.monotonic() - saved >= 60 * settings.save_every_minutes:
                    save(state())
                    saved = time.monotonic()
                if stop.requested:
                    break
            else:
                assert at.step_in_epoch == len(batches), f"the epoch had {at.step_in_epoch} of {len(batches)} batches"
                judge.evaluate_epoch(at)
                at = at.next_epoch()
        if save:
            save(state())
        model.train(False)
        held = judge.interrupt(at, stop.requested) if stop.requested else judge.finish(at)
    return FitResult(
        position=at,
        weights_position=held,
        interrupted=stop.requested is not None,
        metrics=judge.metrics,
        precision=numbers.precision,
        pairs=journal.meter.pairs,
        seconds=time.monotonic() - began,
        skipped=tuple(journal.skipped.values()),
    )


def _train_step(
    stepper: Stepper, logger: RunLogger, ledger: CostLedger | None, batch: Batch, at: TrainPosition
) -> None:
    """One step, told to the journal and to the ledger."""
    if stepper.micro_batch is None:
        choice = stepper.choose_micro_batch(batch)
        logger.log_event("pieces", choice.reason, step=at.step, micro_batch=choice.micro_batch)
    took = ledger.time_step(stepper, batch, at.step) if ledger else stepper.step(batch, at.step)
    logger.log_step(at, batch, took)
    if ledger:
        ledger.count_step_flops(stepper, batch, at.step)


class BestCheckpoint:
    """Evaluates before the first step and at ends of epochs; keeps a copy of the selection of the best so far."""

    def __init__(
        self,
        stepper: Stepper,
        logger: RunLogger,
        evaluate: _EvaluateFunction | None,
        primary: str,
        settings: TrainSettings,
        epochs: int,
        best: BestEvaluation | None,
    ):
        assert evaluate is None or primary or settings.select == "last", "which metric decides?"
        self.stepper, self.logger, self.evaluate, self.primary = stepper, logger, evaluate, primary
        self.keep, self.epochs, self.best = settings.select, epochs, best
        auto = -(-epochs // _EVALUATIONS_PER_RUN)
        self.eval_interval_epochs = auto if settings.evaluate_every == "auto" else settings.evaluate_every
        self.metrics: Mapping[str, float] = {}

    def evaluate_initial(self, at: TrainPosition) -> None:
        """Heads that start from a closed form may be the best there will be; others show where they came from."""
        if self.evaluate is not None:
            self._evaluate("start", at, 0)

    def evaluate_epoch(self, at: TrainPosition) -> None:
        """Evaluates if it is time; the model comes back in train mode."""
        done = at.epoch + 1
        if self.evaluate is not None and (done % self.eval_interval_epochs == 0 or done == self.epochs):
            self._evaluate(f"epoch {done}", at, done)

    def _evaluate(self, when: str, at: TrainPosition, done: int) -> None:
        assert self.evaluate is not None
        self.stepper.model.train(False)
        self.metrics = metrics = dict(self.evaluate())
        self.stepper.model.train()
        # a task with directions or languages gives dozens of numbers; the log has them all
        shown = {name: value for name, value in metrics.items() if name == self.primary or "/" not in name}
        line = f"{when}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        better = self.keep == "best" and self.is_improvement(metrics)
        if better:
            self.best = BestEvaluation(at, metrics, self.stepper.selected_weights(copied=True))
            line += "; the best so far"
        self.logger.log_event("evaluation", line, step=at.step, epoch=done, best=better, metrics=metrics)

    def is_improvement(self, metrics: Mapping[str, float]) -> bool:
        """Whether the deciding metric is the highest so far; one that is not a number is lower than any."""
        assert self.primary in metrics, f"primary={self.primary!r} is none of the metrics {sorted(metrics)}"
        if self.best is None:
            return True
        new, old = metrics[self.primary], self.best.metrics[self.primary]
        return new > old or (math.isnan(old) and not math.isnan(new))

    def finish(self, at: TrainPosition) -> TrainPosition:
        """Ends a run that has done all its epochs, with the weights to keep; returns where they are from."""
        held = at
        line = f"done after {at.step} steps; these are the weights of the last"
        if self.best is not None:
            self.stepper.load_weights(self.best.weights)
            held, self.metrics = self.best.position, self.best.metrics
            kept = "these are the weights of the last" if held.step == at.step else f"back to those of step {held.step}"
            line = f"done after {at.step} steps; {kept}, best by {self.primary} ({self.metrics[self.primary]:.4g})"
        self.logger.log_event("stop", line, step=at.step, interrupted=False, held_step=held.step, metrics=self.metrics)
        return held

    def interrupt(self, at: TrainPosition, signal: str) -> TrainPosition:
        """Ends a run that was told to stop, with the weights as they stand."""
        self.metrics = {}
        line = f"stopped by {signal} after {at.step} of {self.stepper.steps} steps"
        self.logger.log_event("stop", line, step=at.step, interrupted=True, held_step=at.step, metrics={})
        return at
