"""The training loop on one screen: fetch, encode, loss, step, log, evaluate, save.

In: a model that turns a batch into embeddings, a stream of batches, a loss, settings, callbacks. Out: the model trained
in place, and ``FitResult``; on the way metrics to the tracker, states to ``save``, progress to the reporter.
Note: it knows protocols only. A run that stops after any step and goes on from the state saved there ends in the
same bits as one that never stopped, since the position is the whole of the random state (``training.state``); on a GPU,
as far as its kernels repeat themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from accelerate import Accelerator

from clasp.training.cost.ledger import CostLedger
from clasp.training.interrupt import GracefulStop
from clasp.training.precision import PrecisionChoice, resolve_precision
from clasp.training.settings import TrainPlan, TrainSettings, plan_training
from clasp.training.state import BestEvaluation, FitResult, TrainPosition, TrainState
from clasp.training.step import Stepper, Trainable
from clasp.training.trackers.console import Reporter, SilentReporter
from clasp.training.trackers.run_logger import RunLogger
from clasp.types import Batch, Loss, Tracker

__all__ = [
    "BatchStream",
    "FitCallbacks",
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
_SaveFunction = Callable[[TrainState], None]


@runtime_checkable
class BatchStream(Protocol):
    """Batches by epoch: always ``len`` of them, the same whenever that epoch is asked for.

    ``start`` leaves out as many from the beginning, all of them at ``len``, where only the evaluation is left to do.
    A batch may be short, or empty, where samples could not be read.
    """

    def __len__(self) -> int: ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FitCallbacks:
    """What the loop calls on its way.

    ``tracker`` gets the events start, pieces, step, skipped, evaluation and stop. ``evaluate`` is called with the model
    in eval mode; ``primary`` names the metric in its answer that decides, greater being better. ``save`` gets the state
    every ``save_every_minutes``, on Ctrl-C or SIGTERM, and at the end. ``ledger`` times and counts every step.
    """

    tracker: Tracker
    reporter: Reporter = field(default_factory=SilentReporter)
    evaluate: _EvaluateFunction | None = None
    primary: str = ""
    save: _SaveFunction | None = None
    ledger: CostLedger | None = None


def fit(
    model: Trainable,
    batches: BatchStream,
    loss: Loss,
    settings: TrainSettings,
    callbacks: FitCallbacks,
    *,
    kinds: Mapping[str, str] = {},
    resume_state: TrainState | None = None,
) -> FitResult:
    """Trains the selection in place; leaves the model in eval mode, on the device that it was trained on.

    ``kinds`` has the kind of each parameter that trains, a key of ``lr_factors``; where it is empty, all have one
    learning rate. A run that is given a saved state as ``resume_state`` goes on there. Raises UserError when the loss
    or its gradient is not finite, before the step that would have spoilt the weights, and when ``resume_state`` is of a
    run that trains something else.
    """
    assert settings.epochs != "auto", "resolve the settings with plan_training first"
    began = time.monotonic()
    session = _open_session(model, loss, settings, callbacks, settings.epochs * len(batches), kinds, resume_state)
    journal, judge = session.journal, session.judge
    at = resume_state.position if resume_state else TrainPosition()
    with GracefulStop() as stop, journal:
        session.log_start(at)
        model.train()
        if resume_state is None:
            judge.evaluate_initial(at)
        while at.epoch < settings.epochs and not stop.requested:
            for batch in journal.time_batches(batches.epoch(at.epoch, start=at.step_in_epoch)):
                journal.log_skipped(batch, at.step)
                if len(batch.ids) > 1:  # fewer have nothing to be told apart from
                    _train_step(session.stepper, journal, callbacks.ledger, batch, at)
                at = at.next_step()
                session.save_if_due(at)
                if stop.requested:
                    break
            else:
                assert at.step_in_epoch == len(batches), f"the epoch had {at.step_in_epoch} of {len(batches)} batches"
                judge.evaluate_epoch(at)
                at = at.next_epoch()
        session.save(at)
        model.train(False)
        held = judge.interrupt(at, stop.requested) if stop.requested else judge.finish(at)
    return FitResult(
        position=at,
        weights_position=held,
        interrupted=stop.requested is not None,
        metrics=judge.metrics,
        precision=session.numbers.precision,
        pairs=journal.meter.pairs,
        seconds=time.monotonic() - began,
        skipped=tuple(journal.skipped.values()),
    )


def _train_step(
    stepper: Stepper, logger: RunLogger, ledger: CostLedger | None, batch: Batch, at: TrainPosition
) -> None:
    """Takes one step, logs it, and counts its FLOPs where there is a ledger."""
    if stepper.micro_batch is None:
        choice = stepper.choose_micro_batch(batch)
        logger.log_event("pieces", choice.reason, at.step, micro_batch=choice.micro_batch)
    took = ledger.time_step(stepper, batch, at.step) if ledger else stepper.step(batch, at.step)
    logger.log_step(at, batch, took)
    if ledger:
        ledger.count_step_flops(stepper, batch, at.step)


def _open_session(
    model: Trainable,
    loss: Loss,
    settings: TrainSettings,
    callbacks: FitCallbacks,
    steps: int,
    kinds: Mapping[str, str],
    resume_state: TrainState | None,
) -> _Session:
    """What one call of ``fit`` works with: from the beginning, or as it was when ``resume_state`` was saved."""
    # Autocast is ours to apply (training.step): accelerate allows one precision in the life of a process, and its
    # `prepare` would leave a wrapper on the model's forward. It brings the device, and later the other processes.
    accelerator = Accelerator(mixed_precision="no")
    numbers = (
        PrecisionChoice(resume_state.precision, "as before the stop")
        if resume_state
        else resolve_precision(settings.precision, accelerator.device)
    )
    stepper = Stepper(model, loss, settings, accelerator, numbers.precision, steps=steps, kinds=kinds)
    if resume_state:
        stepper.restore(resume_state)
    assert settings.epochs != "auto"
    journal = RunLogger(
        callbacks.tracker,
        callbacks.reporter,
        steps=steps,
        epochs=settings.epochs,
        log_every=settings.log_every,
        skipped=resume_state.skipped if resume_state else (),
    )
    best = resume_state.best if resume_state else None
    judge = BestCheckpoint(stepper, journal, callbacks.evaluate, callbacks.primary, settings, settings.epochs, best)
    return _Session(stepper, journal, judge, numbers, callbacks.save)


class _Session:
    """One call of ``fit``: its stepper, its logger, its best checkpoint, and when the state was last saved."""

    def __init__(
        self,
        stepper: Stepper,
        journal: RunLogger,
        judge: BestCheckpoint,
        numbers: PrecisionChoice,
        save: _SaveFunction | None,
    ):
        self.stepper, self.journal, self.judge, self.numbers = stepper, journal, judge, numbers
        self._save, self._saved = save, time.monotonic()

    def log_start(self, at: TrainPosition) -> None:
        device, numbers = self.stepper.accelerator.device, self.numbers
        self.journal.log_event(
            "start",
            f"computing in {numbers.precision} on {device.type}: {numbers.reason}",
            at.step,
            steps=self.journal.steps,
            epochs=self.journal.epochs,
            device=str(device),
            **numbers._asdict(),
        )

    def save_if_due(self, at: TrainPosition) -> None:
        """Saves when the last saving is ``save_every_minutes`` ago."""
        if time.monotonic() - self._saved >= 60 * self.stepper.settings.save_every_minutes:
            self.save(at)

    def save(self, at: TrainPosition) -> None:
        """Hands on all that going on exactly from ``at`` needs."""
        if self._save is None:
            return
        stepper = self.stepper
        weights, memory = stepper.selected_weights(), stepper.optimizer_state()
        skipped = tuple(self.journal.skipped.values())
        self._save(
            TrainState(at, self.numbers.precision, weights, memory, self.judge.best, skipped, stepper.micro_batch)
        )
        self._saved = time.monotonic()


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
        named = {f"validation/{name}": value for name, value in metrics.items()}
        self.logger.log_event("evaluation", line, at.step, named, epoch=done, best=better)

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
        named = {f"selected/{name}": value for name, value in self.metrics.items()}
        self.logger.log_event("stop", line, at.step, named, interrupted=False, held_step=held.step)
        return held

    def interrupt(self, at: TrainPosition, signal: str) -> TrainPosition:
        """Ends a run that was told to stop, with the weights as they stand."""
        self.metrics = {}
        line = f"stopped by {signal} after {at.step} of {self.stepper.steps} steps"
        self.logger.log_event("stop", line, at.step, interrupted=True, held_step=at.step)
        return at
