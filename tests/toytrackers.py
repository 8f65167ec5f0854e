"""Trackers for tests: one that a recipe can name from outside, and the loop's callbacks with a log in memory.

``Diary`` appends what it gets to ``diary.jsonl`` in the run folder, and draws random numbers on the way as a careless
tracker might.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clasp.training.loop import FitCallbacks
from clasp.training.trackers.jsonl import JsonLinesTracker
from clasp.types import TrackedRun


def callbacks(log: list[dict[str, Any]], **others: Any) -> FitCallbacks:
    """Callbacks whose tracker adds the lines of ``log.jsonl`` to a list."""
    return FitCallbacks(tracker=JsonLinesTracker(lambda name, rows: log.extend(map(dict, rows))), **others)


class Diary:
    """A tracker of somebody's own."""

    def __init__(self, run: TrackedRun):
        self.run = run

    def _write(self, what: str, value: Any, step: int | None = None) -> None:
        torch.rand(3), random.random()
        with open(self.run.folder / "diary.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([what, value, step]) + "\n")

    def config(self, recipe: dict[str, Any]) -> None:
        self._write("config", recipe, self.run.step)

    def log(self, metrics: Mapping[str, float | str | int], step: int) -> None:
        self._write("log", dict(metrics), step)

    def finish(self, results: Sequence[Mapping[str, Any]]) -> None:
        self._write("finish", list(results))


class Unreachable(Diary):
    """Its server is gone at the second step."""

    def log(self, metrics: Mapping[str, float | str | int], step: int) -> None:
        if step >= 2:
            raise ConnectionError("no route\nto host")
        super().log(metrics, step)


class NeverThere(Diary):
    """Its server was never there."""

    def config(self, recipe: dict[str, Any]) -> None:
        raise ConnectionError("no route to host")


class Half:
    """No tracker: it cannot finish."""

    def __init__(self, run: TrackedRun):
        pass

    def config(self, recipe: dict[str, Any]) -> None: ...
