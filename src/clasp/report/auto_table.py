"""What ``clasp train auto`` tried: ``plan.json`` of its run, and the table of the terminal and the model card.

Input: an ``AutoRow`` for each candidate and stage. Output: the file and the table. Note: the file is all that a climb
resumes from, beside the folders of its stages; it is written after every row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from clasp.data.atomic_files import translate_disk_errors, write_text_file
from clasp.report.tables import format_metric, selection_note
from clasp.training.cost.ledger import format_si
from clasp.training.run_files import PLAN_FILE
from clasp.types import UserError

Verdict = Literal["tried", "kept", "not better", "left out"]
_COLUMNS = ("tried", "s", "metric", "95 %", "change", "95 %", "trained", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRow:
    """One candidate in memory (``stage`` empty), or one stage; metrics are fractions, intervals 95 %.

    ``change`` is from the best stage before, by a paired bootstrap; ``trained`` counts parameters, ``steps`` gradient
    steps. A stage that was left out has a reason and no metric.
    """

    stage: str = ""
    method: str
    reason: str = ""
    verdict: Verdict
    seconds: float = 0.0
    steps: int = 0
    metric: float | None = None
    interval: tuple[float, float] | None = None
    change: float | None = None
    change_interval: tuple[float, float] | None = None
    trained: int | None = None


@dataclass(slots=True)
class AutoPlan:
    """The state of a climb.

    ``seconds``, ``energy_kwh``: those of all sessions, the latter ``None`` where it was not measured;
    ``seconds_of_features``: those that features of all pairs take, as the last search estimated them;
    ``reserved_seconds``: those that the closed form of tuned towers will take,
    once a method of tuning was timed; ``best``: the folder name of the best stage.
    """

    recipe: dict[str, Any]
    primary: str = ""
    seconds: float = 0.0
    energy_kwh: float | None = None
    seconds_of_features: float = 0.0
    reserved_seconds: float = 0.0
    best: str = ""
    finished: bool = False
    rows: list[AutoRow] = field(default_factory=list)

    @property
    def compared(self) -> int:
        """Candidates and stages that were measured on the validation pairs."""
        return sum(row.metric is not None for row in self.rows)

    def row(self, stage: str) -> AutoRow | None:
        """The row of a stage; ``None`` where it has not ended."""
        return next((row for row in self.rows if row.stage == stage), None)

    def write(self, run: Path) -> None:
        """Write ``plan.json``."""
        with translate_disk_errors(run):
            write_text_file(run / PLAN_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, run: Path) -> AutoPlan:
        """Read ``plan.json``. Raises ``UserError`` where it is damaged."""
        try:
            given = json.loads((run / PLAN_FILE).read_text(encoding="utf-8-sig"))
            return cls(**{**given, "rows": [_read_row(row) for row in given["rows"]]})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{run / PLAN_FILE} is damaged: {error}") from None


def _read_row(given: Mapping[str, Any]) -> AutoRow:
    pairs = {key: tuple(given[key]) for key in ("interval", "change_interval") if given[key] is not None}
    return AutoRow(**{**given, **pairs})


@dataclass(frozen=True, slots=True)
class AutoTable:
    """Columns, cells and notes of what was tried."""

    columns: Sequence[str]
    cells: list[list[str]]
    notes: list[str]


def auto_table(plan: AutoPlan) -> AutoTable:
    """A row for each candidate and stage, in the order in which they were tried."""
    name = plan.primary.rpartition("/")[2]
    cells = [_cells(row, name) for row in plan.rows]
    reasons = [f"{row.stage or row.method}: {row.reason}" for row in plan.rows if row.reason]
    note = f"metric: {plan.primary} on the validation pairs; change: from the best stage before, paired bootstrap"
    return AutoTable(_COLUMNS, cells, [note, *selection_note(plan.compared, "stage"), *reasons])


def _cells(row: AutoRow, metric: str) -> list[str]:
    if row.metric is None:
        return [row.stage or row.method, "", "", "", "", "", "", row.verdict]

    def interval(ends: tuple[float, float] | None) -> str:
        return "" if ends is None else "–".join(format_metric(metric, end) for end in ends)

    change = "" if row.change is None else f"{100 * row.change:+.1f}"
    between = "" if row.change_interval is None else " to ".join(f"{100 * end:+.1f}" for end in row.change_interval)
    trained = "" if row.trained is None else format_si(row.trained, "")
    shown = [format_metric(metric, row.metric), interval(row.interval), change, between, trained, row.verdict]
    return [row.stage or row.method, f"{row.seconds:,.0f}", *shown]
