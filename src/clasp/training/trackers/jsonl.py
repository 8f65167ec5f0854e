"""The tracker that every run has: events to ``log.jsonl``, final results to ``results.jsonl``.

Input: what the loop logs, with flat names. Output: JSON lines in the run folder, distinguished by ``event``. Note: the
validation metrics of a row are nested under ``metrics``, without their prefix; costs are in ``cost.json`` only. A
result has a field ``checksum``. A run that was killed after it wrote its results ends with the same ones when it is
resumed (``RunFolder.keep_results``), and writes none twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clasp.data.atomic_files import read_json_lines, with_checksum, without_checksum
from clasp.training.run_files import LOG_FILE, RESULTS_FILE

AppendFunction = Callable[[str, Iterable[Mapping[str, Any]]], None]
"""Adds rows to a file of the run: ``RunFolder.append``"""

_METRIC_PREFIX = {"evaluation": "validation/", "stop": "selected/"}  # by event


class JsonLinesTracker:
    """Writes a run's record to its folder, by ``append``; ``run`` is the folder, ``None`` where nothing is recorded."""

    def __init__(self, append: AppendFunction, run: Path | None = None):
        self._append, self._run = append, run

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
        """Adds a line to ``results.jsonl`` for each result that it does not have, but for its seconds."""
        file = None if self._run is None else self._run / RESULTS_FILE
        recorded: set[str] = set()
        if file is not None and file.exists():
            recorded.update(map(_without_time, read_json_lines(file)))
        self._append(RESULTS_FILE, [with_checksum(row) for row in results if _without_time(row) not in recorded])


def _without_time(row: Mapping[str, Any]) -> str:
    return json.dumps({**without_checksum(row), "seconds": 0}, sort_keys=True)
