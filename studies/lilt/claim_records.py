"""The records of a claim by row and number of pairs, and which are missing.

Input: a claim, the size of the study, its records. Output: counts for ``paired_intervals``, always of the seeds that
all compared rows have, so that a table can be made from an incomplete study.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from studies.lilt.cells import Cell, Row, Runner
from studies.lilt.claims import Claim, Size, affordable, to_choose
from studies.lilt.rows import FULL
from studies.paired_intervals import Counts
from studies.records import Record

At = tuple[str, int]
"""A row's name, and its number of training pairs"""


@dataclass(frozen=True)
class Choice:
    """The learning rates ``tried`` for a row, with their validation metric, and the selected one, if known."""

    row: str
    tried: dict[float, float]
    rate: float | None


@dataclass(frozen=True)
class Found:
    """The records of one claim."""

    asked: dict[At, dict[int, Record]]
    """Records by seed"""
    costs: dict[str, Record]
    """FLOPs and memory of a row, by its name"""
    speeds: dict[str, Record]
    """Timings of a row, by its name"""
    missing: list[Cell]
    rates: list[Choice]
    """Learning rates of the rows that select one"""

    def seeds(self, rows: Sequence[At]) -> list[int]:
        """The seeds that all of some rows have."""
        return sorted(set.intersection(*(set(self.asked.get(row, {})) for row in rows)))

    def counts(self, rows: Sequence[At], name: str) -> list[Counts] | None:
        """Counts of one answer; ``None`` where the rows have no common seed."""
        seeds = self.seeds(rows)
        if not seeds:
            return None
        return [Counts.of([self.asked[row][seed]["answers"][name] for seed in seeds]) for row in rows]

    def afforded(self, row: Row, size: Size) -> At | None:
        """A row at the number of pairs within the budget of claim 5, where FLOPs have been counted."""
        pairs = affordable(self.costs.get(FULL.name), self.costs.get(row.name), size)
        return None if pairs is None else (row.name, pairs)

    def trained(self, at: At) -> tuple[int, int]:
        """Trainable and total parameters."""
        count = next(iter(self.asked[at].values()))["counts"]["model"]
        return count["trained"], count["total"]


def find(claim: Claim, size: Size, runner: Runner, timed: Sequence[Cell]) -> Found:
    """All records of a claim; ``timed`` are the cells run on an idle machine."""
    cells = list(claim.cells(size, runner.record))
    rows = {cell.row.name: cell.row for cell in cells if cell.purpose == "ask" and len(cell.row.rates) > 1}
    rates = {name: _rates(row, claim, size, runner) for name, row in rows.items()}
    asked: dict[At, dict[int, Record]] = {}
    costs: dict[str, Record] = {}
    for cell in cells:
        record, choice = runner.record(cell), rates.get(cell.row.name)
        if cell.purpose == "count" and record is not None:
            costs[cell.row.name] = record
        elif (
            cell.purpose == "ask"
            and record is not None
            and (choice is None or not choice.tried or cell.rate == choice.rate)
        ):
            asked.setdefault((cell.row.name, cell.pairs), {})[cell.seed] = record
    return Found(
        asked=asked,
        costs=costs,
        speeds={cell.row.name: record for cell in timed if (record := runner.record(cell)) is not None},
        missing=runner.missing(cells),
        rates=[choice for choice in rates.values() if choice.tried],
    )


def _rates(row: Row, claim: Claim, size: Size, runner: Runner) -> Choice:
    cells, rate = to_choose(row, claim.world, size, runner.record)
    tried = {cell.rate: record for cell in cells if (record := runner.record(cell)) is not None}
    return Choice(row.name, {each: record["validation"] for each, record in tried.items()}, rate)
