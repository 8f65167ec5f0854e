"""What a person sees: plain lines by the clock, a bar on a terminal, and rates that add up."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from clasp.training.trackers.console import BarReporter, LineReporter, ThroughputMeter, TrainProgress, stderr_reporter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def at(step: int) -> TrainProgress:
    return TrainProgress(
        step, 9, 1, 3, loss=2.5, pairs_per_second=1234.5, seconds_left=3725.2, data_seconds_share=0.125
    )


def test_a_line_every_ten_seconds_and_at_the_end() -> None:
    clock, said = Clock(), list[str]()
    lines = LineReporter(said.append, clock=clock)
    lines.start(9)
    for step in range(1, 10):
        clock.now += 4.0
        lines.step(at(step))
    lines.note("[done] 100 %")
    assert [line.split("step ")[1].split("/")[0] for line in said[:-1]] == ["3", "6", "9"]
    assert said[0] == "epoch 1/3  step 3/9  loss 2.500  1,234 pairs/s  data 12 %  1:02:05 left"
    assert said[-1] == "[done] 100 %"


def test_bar_draws_and_keeps_notes() -> None:
    stream = io.StringIO()
    bar = BarReporter(Console(file=stream, force_terminal=True, width=140))
    bar.start(9)
    bar.step(at(4))
    bar.note("skipped [a]: truncated")
    bar.stop()
    assert "step 4/9" in stream.getvalue() and "skipped [a]: truncated" in stream.getvalue()


def test_lines_where_standard_error_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = stderr_reporter()
    assert isinstance(reporter, LineReporter)
    reporter.note("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_meter_by_hand() -> None:
    clock = Clock()

    def slow() -> Iterator[int]:
        for number in range(3):
            clock.now += 1.0  # one second of data
            yield number

    meter = ThroughputMeter(window=2, clock=clock)
    for number in meter.time_batches(slow()):
        clock.now += 3.0  # three seconds of work
        meter.end_step(pairs=8, loss=float(number))
        clock.now += 100.0  # saving, evaluation: nobody's
    rates = meter.averages_since_last()
    assert (rates.loss, rates.pairs_per_second, rates.seconds_per_step, rates.data_seconds_share) == (
        1.0,
        2.0,
        4.0,
        0.25,
    )
    assert meter.recent_averages().loss == 1.5 and meter.pairs == 24
