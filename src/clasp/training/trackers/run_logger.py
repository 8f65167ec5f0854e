"""Logging of the training loop: metrics to the tracker, lines and a progress bar to the console.

Input: every step, and single events. Output: metrics to a ``Tracker``, progress and lines to a ``Reporter``. Steps and
epochs are counted from 1.
Note: an unreadable sample is logged once in a run, not once an epoch; the log has all of them, the console the first
few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from clasp.training.state import TrainPosition
from clasp.training.step import StepResult
from clasp.training.trackers.console import Reporter, ThroughputMeter, TrainProgress
from clasp.training.trackers.group import skipped_event
from clasp.types import Batch, SkippedSample, Tracker

_MAX_SKIPPED_SHOWN = 5


class RunLogger:
    """Logs one run; as a context manager it starts and stops the progress bar, and flushes unlogged steps."""

    def __init__(
        self,
        tracker: Tracker,
        reporter: Reporter,
        *,
        steps: int,
        epochs: int,
        log_every: int,
        skipped: Sequence[SkippedSample],
    ):
        self.tracker, self.reporter = tracker, reporter
        self.steps, self.epochs, self.log_every = steps, epochs, log_every
        self.meter = ThroughputMeter()
        self.skipped = {sample.id: sample for sample in skipped}
        self._last: tuple[TrainPosition, StepResult] | None = None

    def __enter__(self) -> RunLogger:
        self.reporter.start(self.steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            self.reporter.stop()

    def time_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, timed."""
        return self.meter.time_batches(batches)

    def log_skipped(self, batch: Batch, step: int) -> None:
        """Log the samples that the batch left out, after ``step`` steps."""
        for sample in batch.skipped:
            if sample.id not in self.skipped:
                self._log_skipped_sample(sample, step)

    def log_step(self, at: TrainPosition, batch: Batch, step: StepResult) -> None:
        """Record the result of the step at a position; logs every ``log_every`` steps."""
        self.meter.end_step(batch.total_pairs, step.loss)
        self._last = (at, step)
        done = at.step + 1
        rates = self.meter.recent_averages()
        self.reporter.step(
            TrainProgress(
                step=done,
                steps=self.steps,
                epoch=at.epoch + 1,
                epochs=self.epochs,
                loss=rates.loss,
                pairs_per_second=rates.pairs_per_second,
                seconds_left=(self.steps - done) * rates.seconds_per_step,
                data_seconds_share=rates.data_seconds_share,
            )
        )
        if done % self.log_every == 0 or done == self.steps:
            self.flush()

    def _log_skipped_sample(self, sample: SkippedSample, step: int) -> None:
        self.skipped[sample.id] = sample
        self.tracker.log(skipped_event(sample), step)
        if len(self.skipped) <= _MAX_SKIPPED_SHOWN:
            self.reporter.note(f"skipped {sample.id}: {sample.reason}")
        elif len(self.skipped) == _MAX_SKIPPED_SHOWN + 1:
            self.reporter.note("more samples are skipped; the log names them all")

    def flush(self) -> None:
        """Log the steps since the last line, if any: loss and rates are means over them."""
        if self._last is None:
            return
        (at, step), self._last = self._last, None
        rates = self.meter.averages_since_last()
        metrics = {
            "epoch": at.epoch + 1,
            "loss": rates.loss,
            "lr": step.lr,
            "scale": step.scale,
            "gradient_norm": step.gradient_norm,
            "pairs_per_second": rates.pairs_per_second,
            "data_seconds_share": rates.data_seconds_share,
            "skipped": len(self.skipped),
        }
        named = {f"train/{name}": value for name, value in metrics.items()}
        self.tracker.log({"event": "step", **named}, at.step + 1)

    def log_event(
        self, event: str, line: str, step: int, metrics: Mapping[str, float | int] = {}, **facts: str | float | int
    ) -> None:
        """Log an event other than a step, after ``step`` steps, with named metrics; prints ``line``."""
        self.flush()
        self.tracker.log({"event": event, **facts, **metrics}, step)
        self.reporter.note(line)
