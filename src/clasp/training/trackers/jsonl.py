"""The tracker that every run has: events to ``log.jsonl``, final results to ``results.jsonl``.

Input: what the loop logs, with flat names. Output: JSON lines in the run folder, distinguished by ``event``. Note: the
validation metrics of a row are nested under ``metrics``, without their prefix; costs are in ``cost.json`` only. A
result has a field ``checksum``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from clasp.data.atomic_files import with_checksum

LOG_FILE, RESULTS_FILE = "log.jsonl", "results.jsonl"

AppendFunction = Callable[[str, Iterable[Mapping[str, Any]]], None]
"""Adds rows to a file of the run: ``RunFolder.append``"""

_METRIC_PREFIX = {"evaluation": "validation/", "stop": "selected/"}  # by event


class JsonLinesTracker:
    """Writes a run's record to its folder."""

    def __init__(self, append: AppendFunction):
        self._append = append

    def config(self, recipe: dict[str, Any]) -> None:
        """Writes nothing: ``recipe.toml`` has it."""

    def log(self, metrics: Mapping[str, float | str | int], step: int) -> None:
        """Adds a line to ``log.jsonl``."""
        event = metrics["event"]
        if event == "cost":
            return
        row: dict[str, Any] = {"event": event} if event == "skipped" else {"event": event, "step": step}
        prefix = _METRIC_PREFIX.get(str(event))
        if prefix is None:
            row |= {name.removeprefix("train/"): value for name, value in metrics.items()}
        else:
            row |= {name: value for name, value in metrics.items() if not name.startswith(prefix)}
            row["metrics"] = {
                name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)
            }
        self._append(LOG_FILE, [row])

    def finish(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Adds a line to ``results.jsonl`` for each result."""
        self._append(RESULTS_FILE, map(with_checksum, results))
