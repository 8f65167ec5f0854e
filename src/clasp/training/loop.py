"""The training loop: fetch, encode, loss, step, log, evaluate, save.

Input: a model that embeds a batch, a stream of batches, a loss, settings, callbacks. Output: the model trained in place
and ``FitResult``; during training, metrics go to the tracker, states to ``save``, progress to the reporter.
Note: depends on protocols only. A run that is interrupted after any step and resumed from the state saved there ends
with bitwise the same weights as an uninterrupted one, since all random state derives from the position
(``training.state``); on a GPU, as far as its kernels are deterministic. Long: steps, evaluation, selection of the best
weights and interruption share one position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, Protocol, runtime_checkable

from clasp.errors import counted
from clasp.models.precision import PrecisionChoice, resolve_precision
from clasp.training.cost.ledger import CostLedger
from clasp.training.distributed import Processes
from clasp.training.interrupt import GracefulStop
from clasp.training.settings import TrainSettings
from clasp.training.state import BestEvaluation, FitResult, TrainPosition, TrainState
from clasp.training.step import Stepper, Trainable
from clasp.training.trackers.console import Reporter, SilentReporter
from clasp.training.trackers.run_logger import RunLogger
from clasp.types import Batch, Loss, Tracker

_EVALUATIONS_PER_RUN = 10

_EvaluateFunction = Callable[[], Mapping[str, float]]
_SaveFunction = Callable[[TrainState], None]


@runtime_checkable
class BatchStream(Protocol):
    """Batches by epoch: always ``len`` of them, the same each time an epoch is read.

    ``start`` skips that many batches; at ``len``, all of them, where only the evaluation is left to do.
    A batch may be short or empty where samples could not be read.
    """

    def __len__(self) -> int: ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FitCallbacks:
    """Callbacks of the training loop.

    ``tracker`` receives the events start, pieces, step, skipped, evaluation and stop. ``evaluate`` is called with the
    model in eval mode; ``primary`` names the metric in its result that selects the best weights (higher is better).
    ``save`` receives the state before the first step, every ``save_every_minutes``, on Ctrl-C or SIGTERM, and at the
    end.
    """

    tracker: Tracker
    reporter: Reporter = field(default_factory=SilentReporter)
    evaluate: _EvaluateFunction | None = None
    primary: str = ""
    save: _SaveFunction | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """What a run of the training loop may have beside its settings.

    ``kinds`` maps each trainable parameter to its kind, a key of ``lr_factors``; where it is empty, all have the same
    learning rate. Training resumes at ``resume_state`` where given. ``processes`` train together: each calls ``fit``
    with its own part of the batches and with callbacks of its own; all have a ledger, or none. ``precision``: that of
    the settings, with the reason that is told. ``ledger`` measures the time and FLOPs of every step.
    """

    kinds: Mapping[str, str] = field(default_factory=dict)
    resume_state: TrainState | None = None
    processes: Processes = field(default_factory=Processes)
    precision: PrecisionChoice | None = None
    ledger: CostLedger | None = None


def fit(
    model: Trainable,
    batches: BatchStream,
    loss: Loss,
    settings: TrainSettings,
    callbacks: FitCallbacks,
    options: FitOptions | None = None,
) -> FitResult:
    """Train the selected parameters in place; leaves the model in eval mode, on the device that it was trained on.

    Raises ``UserError`` when the loss or its gradient is not finite, before the weights are updated, and when the state
    to resume has other trainable parameters.
    """
    options = options or FitOptions()
    resume_state = options.resume_state
    began = time.monotonic()
    steps, settings = _within_max_steps(settings, len(batches))
    assert settings.epochs != "auto"
    session = _open_session(model, loss, settings, callbacks, options, steps)
    logger, best_checkpoint = session.logger, session.best_checkpoint
    at = resume_state.position if resume_state else TrainPosition()
    agree = options.processes.agree_on_signal
    with GracefulStop() as stop, logger:
        session.log_start(at)
        model.train()
        if resume_state is None:
            best_checkpoint.evaluate_initial(at)
            session.save(at)  # at once, so that a kill from here on loses no start-up
        requested = agree(stop.requested)
        while at.epoch < settings.epochs and not requested:
            for batch in logger.time_batches(_rest_of_epoch(batches, at, steps)):
                logger.log_skipped(batch, at.step)
                if batch.total_pairs > 1:  # a single pair has no negatives
                    _train_step(session.stepper, logger, options.ledger, batch, at)
                at = at.next_step()
                session.save_if_due(at)
                if requested := agree(stop.requested):
                    break
            else:
                whole = at.step_in_epoch == len(batches) or at.step == steps
                assert whole, f"the epoch had {at.step_in_epoch} of {len(batches)} batches"
                best_checkpoint.evaluate_epoch(at)
                at = at.next_epoch()
                requested = agree(stop.requested)
        session.save(at)
        model.train(False)
        weights_position = best_checkpoint.interrupt(at, requested) if requested else best_checkpoint.finish(at)
    return FitResult(
        position=at,
        weights_position=weights_position,
        interrupted=requested is not None,
        metrics=best_checkpoint.metrics,
        precision=session.precision_choice.precision,
        pairs=logger.meter.pairs,
        seconds=time.monotonic() - began,
        evaluation=best_checkpoint.evaluation,
        skipped=tuple(logger.skipped.values()),
    )


def _within_max_steps(settings: TrainSettings, steps_per_epoch: int) -> tuple[int, TrainSettings]:
    """The number of steps, and the settings with the epochs that they are in, the last one perhaps in part."""
    assert settings.epochs != "auto", "resolve the settings with plan_training first"
    steps = settings.epochs * steps_per_epoch
    if settings.max_steps is None or settings.max_steps >= steps:
        return steps, settings
    return settings.max_steps, settings.model_copy(update={"epochs": -(-settings.max_steps // steps_per_epoch)})


def _rest_of_epoch(batches: BatchStream, at: TrainPosition, steps: int) -> Iterator[Batch]:
    """The batches of an epoch from a position on, cut where ``steps`` end within it; an epoch that is not cut is read
    to the end of its iterator."""
    rest = batches.epoch(at.epoch, start=at.step_in_epoch)
    left = steps - at.step
    return rest if left >= len(batches) - at.step_in_epoch else islice(rest, left)


def _train_step(
    stepper: Stepper, logger: RunLogger, ledger: CostLedger | None, batch: Batch, at: TrainPosition
) -> None:
    """Take one step and log it."""
    if stepper.micro_batch is None:
        choice = stepper.choose_micro_batch(batch)
        logger.log_event("pieces", choice.reason, at.step, micro_batch=choice.micro_batch)
    planned = stepper.micro_batch
    took = ledger.time_step(stepper, batch, at.step) if ledger else stepper.step(batch, at.step)
    if stepper.micro_batch is not None and stepper.micro_batch != planned:
        line = f"out of memory: in pieces of {counted(stepper.micro_batch, 'pair')} from here on"
        logger.log_event("pieces", line, at.step, micro_batch=stepper.micro_batch)
    logger.log_step(at, batch, took)


def _open_session(
    model: Trainable,
    loss: Loss,
    settings: TrainSettings,
    callbacks: FitCallbacks,
    options: FitOptions,
    steps: int,
) -> _Session:
    """The objects of one call of ``fit``: new, or restored from ``resume_state``."""
    processes, resume_state = options.processes, options.resume_state
    precision_choice = (
        PrecisionChoice(resume_state.precision, "as before the interruption")
        if resume_state
        else options.precision or resolve_precision(settings.precision, processes.device)
    )
    stepper = Stepper(model, loss, settings, processes, precision_choice.precision, steps=steps, kinds=options.kinds)
    if resume_state:
        stepper.restore(resume_state)
    assert settings.epochs != "auto"
    logger = RunLogger(
        callbacks.tracker,
        callbacks.reporter,
        steps=steps,
        epochs=settings.epochs,
        log_every=settings.log_every,
        skipped=resume_state.skipped if resume_state else (),
    )
    best = resume_state.best if resume_state else None
    best_checkpoint = BestCheckpoint(
        stepper, logger, callbacks.evaluate, callbacks.primary, settings, settings.epochs, best
    )
    return _Session(stepper, logger, best_checkpoint, precision_choice, callbacks.save)


class _Session:
    """One call of ``fit``: its stepper, its logger, its best checkpoint, and when the state was last saved."""

    def __init__(
        self,
        stepper: Stepper,
        logger: RunLogger,
        best_checkpoint: BestCheckpoint,
        precision_choice: PrecisionChoice,
        save: _SaveFunction | None,
    ):
        self.stepper, self.logger, self.best_checkpoint = stepper, logger, best_checkpoint
        self.precision_choice = precision_choice
        self._save, self._saved = save, time.monotonic()

    def log_start(self, at: TrainPosition) -> None:
        device, choice, count = self.stepper.device, self.precision_choice, self.stepper.processes.size
        together: dict[str, float | int] = {"processes": count} if count > 1 else {}
        self.logger.log_event(
            "start",
            f"computing in {choice.precision} on {device.type}: {choice.reason}",
            at.step,
            together,
            steps=self.logger.steps,
            epochs=self.logger.epochs,
            device=str(device),
            **choice._asdict(),
        )

    def save_if_due(self, at: TrainPosition) -> None:
        """Save if the last save was at least ``save_every_minutes`` ago."""
        if time.monotonic() - self._saved >= 60 * self.stepper.settings.save_every_minutes:
            self.save(at)

    def save(self, at: TrainPosition) -> None:
        """Pass everything that an exact resumption at ``at`` needs to the save callback."""
        if self._save is None:
            return
        stepper = self.stepper
        weights, optimizer_state = stepper.selected_weights(), stepper.optimizer_state()
        skipped = tuple(self.logger.skipped.values())
        precision, best = self.precision_choice.precision, self.best_checkpoint.best
        self._save(TrainState(at, precision, weights, optimizer_state, best, skipped, stepper.micro_batch))
        self._saved = time.monotonic()


def count_evaluations(settings: TrainSettings) -> int:
    """Evaluations in a run: before the first step and at the ends of epochs that are due, unless at the end alone; at
    the end of the last epoch."""
    assert settings.epochs != "auto", "resolve the settings with plan_training first"
    if settings.evaluate_every == "end":
        return 1
    return 1 + -(-settings.epochs // max(1, _eval_interval(settings.evaluate_every, settings.epochs)))


def _eval_interval(evaluate_every: int | Literal["auto", "end"], epochs: int) -> int:
    if evaluate_every == "end":
        return max(1, epochs)
    return -(-epochs // _EVALUATIONS_PER_RUN) if evaluate_every == "auto" else evaluate_every


class BestCheckpoint:
    """Evaluates before the first step and at ends of epochs, or at the end alone; keeps a copy of the best trainable
    parameters so far."""

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
        self._at_start = settings.evaluate_every != "end" or epochs == 0
        self.eval_interval_epochs = _eval_interval(settings.evaluate_every, epochs)
        self.metrics: Mapping[str, float] = {}
        self.evaluation: int | None = None
        self._evaluations = 0

    def evaluate_initial(self, at: TrainPosition) -> None:
        """Evaluate before the first step: a baseline, or already the best for heads initialised in closed form."""
        if self.evaluate is not None and self._at_start:
            self._evaluate("start", at, 0)

    def evaluate_epoch(self, at: TrainPosition) -> None:
        """Evaluate if this epoch is due; returns the model to train mode."""
        done = at.epoch + 1
        if self.evaluate is not None and (done % self.eval_interval_epochs == 0 or done == self.epochs):
            self._evaluate(f"epoch {done}", at, done)

    def _evaluate(self, when: str, at: TrainPosition, done: int) -> None:
        assert self.evaluate is not None
        self.stepper.model.train(False)
        self.metrics = metrics = dict(self.evaluate())
        self.stepper.model.train()
        self._evaluations += 1
        # a task with directions or languages gives dozens of metrics; the log has them all
        shown = {name: value for name, value in metrics.items() if name == self.primary or "/" not in name}
        line = f"{when}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        better = self.keep == "best" and self.is_improvement(metrics)
        if better or self.keep == "last":
            self.evaluation = self._evaluations - 1
        if better:
            self.best = BestEvaluation(at, metrics, self.stepper.selected_weights(copied=True))
            line += "; the best so far" if self.epochs else ""
        named = {f"validation/{name}": value for name, value in metrics.items()}
        self.logger.log_event("evaluation", line, at.step, named, epoch=done, best=better)

    def is_improvement(self, metrics: Mapping[str, float]) -> bool:
        """Whether the primary metric is the highest so far; NaN is lower than any number."""
        assert self.primary in metrics, f"primary={self.primary!r} is not one of the metrics {sorted(metrics)}"
        if self.best is None:
            return True
        new, old = metrics[self.primary], self.best.metrics[self.primary]
        return new > old or (math.isnan(old) and not math.isnan(new))

    def finish(self, at: TrainPosition) -> TrainPosition:
        """End a completed run: load the selected weights; returns the position that they are from."""
        weights_position = at
        line = f"done after {counted(at.step, 'step')}; these are the weights of the last"
        if self.best is not None:
            self.stepper.load_weights(self.best.weights)
            weights_position, self.metrics = self.best.position, self.best.metrics
            kept = (
                "these are the weights of the last"
                if weights_position.step == at.step
                else f"back to those of step {weights_position.step}"
            )
            best = f"best by {self.primary} ({self.metrics[self.primary]:.4g})"
            line = f"done after {counted(at.step, 'step')}; {kept}, {best}"
        if not self.stepper.steps:
            line = "done, without a gradient step"
        named = {f"selected/{name}": value for name, value in self.metrics.items()}
        self.logger.log_event("stop", line, at.step, named, interrupted=False, held_step=weights_position.step)
        return weights_position

    def interrupt(self, at: TrainPosition, signal: str) -> TrainPosition:
        """End an interrupted run with the current weights."""
        self.metrics, self.evaluation = {}, None
        line = f"stopped by {signal} after {at.step} of {counted(self.stepper.steps, 'step')}"
        self.logger.log_event("stop", line, at.step, interrupted=True, held_step=at.step)
        return at
