"""The leaderboard of a sweep: rows of ``sweep.jsonl``, a table, and the best run.

Input: folders of finished runs. Output: ``SweepRow``s and their ranking. Reads files and no model. Note: the ranking
metric is that of the validation at the end of training, whatever the run was evaluated on later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clasp.data.atomic_files import translate_disk_errors, write_text_file
from clasp.data.sample_size import MIN_QUERIES, small_sample_warning
from clasp.errors import counted
from clasp.report.run_record import PRIMARY_METRICS, primary_result, read_results
from clasp.report.tables import CHANCE_TITLE, INTERVAL_TITLE, format_interval, format_metric, metric_title
from clasp.training.cost import COST_FILE as COST
from clasp.training.cost.ledger import read_cost
from clasp.types import UserError

_MAX_ERRORS = 3  # of failed runs that are printed


@dataclass(frozen=True, slots=True)
class SweepRow:
    """A line of ``sweep.jsonl``. ``overrides`` are those of the run's recipe; the last of them, ``settings``, are the
    grid's. ``value`` is the ranking metric, with its 95 % interval if it has one, over ``n`` queries; ``chance`` is the
    value at chance. ``seconds`` is the time of training and its evaluations; ``None`` if unknown. ``error`` is why a
    run failed. For other costs of a run see ``clasp.training.cost.ledger.read_cost``."""

    run: str
    overrides: tuple[str, ...]
    settings: tuple[str, ...]
    state: Literal["finished", "stopped", "failed"]
    metric: str = ""
    value: float | None = None
    interval: tuple[float, float] | None = None
    chance: float | None = None
    n: int = 0
    seconds: float | None = None
    error: str = ""

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> SweepRow:
        """The inverse of ``dataclasses.asdict``, by way of JSON."""
        interval = line["interval"] and tuple(line["interval"])
        settings, overrides = tuple(line["settings"]), tuple(line["overrides"])
        return cls(**{**line, "overrides": overrides, "settings": settings, "interval": interval})

    @property
    def sweep_key(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the runs of one sweep have in common: all other overrides but trackers, and the keys of the grid."""
        others = self.overrides[: len(self.overrides) - len(self.settings)]
        fixed = [text for text in others if text.partition("=")[0].strip() != "train.trackers"]
        return tuple(sorted(fixed)), tuple(text.partition("=")[0] for text in self.settings)

    def cells(self) -> list[str]:
        """The row for people: what was set, the metric, its 95 % interval, chance, queries, seconds."""
        name, seconds = self.metric.rpartition("/")[2], "" if self.seconds is None else f"{self.seconds:,.1f}"
        if self.value is None:
            return [" ".join(self.settings), self.state, "", "", "", seconds]
        between = format_interval(name, self.interval)
        chance = "" if self.chance is None else format_metric(name, self.chance)
        value = format_metric(name, self.value)
        return [" ".join(self.settings), value, between, chance, f"{self.n:,}", seconds]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The result of a sweep: the rows of its runs, best first, and whether it was stopped."""

    folder: Path
    rows: list[SweepRow]
    stopped: bool
    combinations: int

    @property
    def finished(self) -> list[SweepRow]:
        """The rows of finished runs, best first."""
        return [row for row in self.rows if row.state == "finished"]

    @property
    def columns(self) -> tuple[str, ...]:
        """Titles of the columns."""
        metrics = dict.fromkeys(row.metric.rpartition("/")[2] for row in self.finished)
        return (
            "set",
            ", ".join(map(metric_title, metrics)),
            INTERVAL_TITLE,
            CHANCE_TITLE,
            "n",
            "s",
        )

    @property
    def cells(self) -> list[list[str]]:
        """The table, best first."""
        return [row.cells() for row in self.rows]

    @property
    def notes(self) -> list[str]:
        """Lines below the table: what its columns are, and why runs failed."""
        failed = [f"{' '.join(row.settings)} failed: {row.error}" for row in self.rows if row.error]
        more = [f"{len(failed) - _MAX_ERRORS} more failed; sweep.jsonl has why"] if len(failed) > _MAX_ERRORS else []
        asked = min((row.n for row in self.finished), default=MIN_QUERIES)
        few = small_sample_warning(asked, "validation queries")
        return [*few, "validation, per cent; n: queries; s: seconds of training", *failed[:_MAX_ERRORS], *more]

    def summary_lines(self) -> list[str]:
        """The best run, and how certain the ranking is. Requires a finished run."""
        best, *others = self.finished
        lines = [f"best: {best.run}"]
        close = [row for row in others if best.interval and row.value is not None and row.value >= best.interval[0]]
        if close:
            lines[0] += f"; within its interval: {len(close)} of {counted(len(others), 'other')}"
        if others:
            lines.append(
                "the best of several on the same pairs is biased upwards by the selection: evaluate it on other pairs"
            )
        return lines


# --- from and to disk ------------------------------------------------------------------------------------------------


def read_finished_row(row: SweepRow) -> SweepRow:
    """The row of a finished run, from its ``results.jsonl``, which starts with the results of its validation."""
    result = primary_result(read_results(Path(row.run)))
    if result is None:
        raise UserError(f"{row.run} has no validation in its results.jsonl")
    name = PRIMARY_METRICS[result.task]
    interval = result.interval.get(name)
    return replace(
        row,
        state="finished",
        metric="/".join(filter(None, (result.task, result.language, name))),
        value=result.metrics[name],
        interval=None if interval is None else tuple(interval),
        chance=result.chance.get(name),
        n=result.n,
        seconds=read_training_seconds(Path(row.run)),
    )


def read_training_seconds(run: Path) -> float | None:
    """Seconds of training and evaluation over all sessions of a run; ``None`` where they were not recorded."""
    if not (run / COST).exists():
        return None
    seconds = read_cost(run).seconds
    return seconds["training"] + seconds["evaluation"]


def ranking_key(row: SweepRow) -> tuple[int, float]:
    """Sort key: the highest value first, runs without a value last."""
    if row.value is None:
        return (2, 0.0)
    return (1, 0.0) if math.isnan(row.value) else (0, -row.value)


def read_sweep_rows(folder: Path) -> dict[str, SweepRow]:
    """The rows of an earlier session of this sweep, by run."""
    file = folder / "sweep.jsonl"
    if not file.exists():
        return {}
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
        rows = [SweepRow.from_dict(json.loads(line)) for line in lines if line.strip()]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it: the runs themselves are not affected") from None
    return {row.run: row for row in rows}


def write_sweep_rows(folder: Path, rows: Iterable[SweepRow]) -> None:
    """Replace ``sweep.jsonl``."""
    with translate_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        write_text_file(folder / "sweep.jsonl", lines)
