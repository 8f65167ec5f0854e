"""Console progress of a run: loss, pairs per second, time left, fraction of time spent waiting for data.

Input: the loop's ``TrainProgress`` after every step, and single lines. Output: a progress bar on a terminal, elsewhere
a plain line about every ten seconds; all on standard error, since results go to standard output. Note: only
``ThroughputMeter`` measures time in the loop; its rates exclude evaluation and saving.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

_Item = TypeVar("_Item")


class TrainProgress(NamedTuple):
    """One step done: ``step`` of ``steps`` in the run, ``epoch`` of ``epochs``, both counted from 1."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    pairs_per_second: float
    seconds_left: float
    data_seconds_share: float

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return (
            f"epoch {self.epoch}/{self.epochs}  step {self.step}/{self.steps}  loss {self.loss:.3f}  "
            f"{self.pairs_per_second:,.0f} pairs/s  data {100 * self.data_seconds_share:.0f} %  {left} left"
        )


@runtime_checkable
class Reporter(Protocol):
    """Shows the progress of a run."""

    def start(self, steps: int) -> None: ...

    def step(self, progress: TrainProgress) -> None: ...

    def note(self, line: str) -> None:
        """Print a permanent line: an evaluation, an unreadable sample, a reason."""
        ...

    def stop(self) -> None: ...


class SilentReporter:
    """Shows nothing."""

    def start(self, steps: int) -> None:
        pass

    def step(self, progress: TrainProgress) -> None:
        pass

    def note(self, line: str) -> None:
        pass

    def stop(self) -> None:
        pass


class LineReporter:
    """Plain lines for files and pipes: one after ``every_seconds``, and one for the last step."""

    def __init__(
        self,
        write_line: Callable[[str], None],
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.write_line = write_line
        self.every_seconds = every_seconds
        self.clock = clock
        self._last = clock()

    def start(self, steps: int) -> None:
        self._last = self.clock()

    def step(self, progress: TrainProgress) -> None:
        if self.clock() - self._last >= self.every_seconds or progress.step == progress.steps:
            self.write_line(str(progress))
            self._last = self.clock()

    def note(self, line: str) -> None:
        self.write_line(line)

    def stop(self) -> None:
        pass


class BarReporter:
    """A progress bar, with notes above it."""

    def __init__(self, console: Console):
        self._rich = RichProgress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=console)
        self._task = self._rich.add_task("", start=False, visible=False)

    def start(self, steps: int) -> None:
        self._rich.start_task(self._task)
        self._rich.update(self._task, total=steps, description="first step", visible=True)
        self._rich.start()

    def step(self, progress: TrainProgress) -> None:
        self._rich.update(self._task, completed=progress.step, description=str(progress))

    def note(self, line: str) -> None:
        self._rich.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._rich.stop()


def stderr_reporter() -> Reporter:
    """A progress bar where standard error is a terminal, else lines."""
    if sys.stderr.isatty():
        return BarReporter(Console(stderr=True, emoji=False))
    return LineReporter(lambda line: print(line, file=sys.stderr, flush=True))


class ThroughputMeter:
    """Measures data and step times; rates over the last ``window`` steps and since the last reading."""

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.pairs = 0
        self._recent: deque[_StepTiming] = deque(maxlen=window)
        self._unread: list[_StepTiming] = []
        self._data_seconds = 0.0
        self._fetched = 0.0

    def time_batches(self, batches: Iterator[_Item]) -> Iterator[_Item]:
        """The same items; measures the time until each arrives."""
        while True:
            requested = self.clock()
            try:
                item = next(batches)
            except StopIteration:
                return
            self._fetched = self.clock()
            self._data_seconds = self._fetched - requested
            yield item

    def end_step(self, pairs: int, loss: float) -> None:
        """End the step that started when its batch arrived."""
        span = _StepTiming(pairs, loss, self._data_seconds, self._data_seconds + self.clock() - self._fetched)
        self.pairs += pairs
        self._recent.append(span)
        self._unread.append(span)

    def recent_averages(self) -> StepAverages:
        return _average(self._recent)

    def averages_since_last(self) -> StepAverages:
        """Rates since the last reading."""
        rates, self._unread = _average(self._unread), []
        return rates


class _StepTiming(NamedTuple):
    """One step: its pairs, its loss, seconds waiting for data, total seconds."""

    pairs: int
    loss: float
    data_seconds: float
    seconds: float


class StepAverages(NamedTuple):
    """Means over some steps."""

    loss: float
    pairs_per_second: float
    seconds_per_step: float
    data_seconds_share: float


def _average(spans: deque[_StepTiming] | list[_StepTiming]) -> StepAverages:
    seconds = max(sum(span.seconds for span in spans), 1e-9)
    return StepAverages(
        loss=sum(span.loss for span in spans) / len(spans),
        pairs_per_second=sum(span.pairs for span in spans) / seconds,
        seconds_per_step=seconds / len(spans),
        data_seconds_share=sum(span.data_seconds for span in spans) / seconds,
    )
