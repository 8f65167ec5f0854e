"""What a case counted, kept in ``counts.json`` from run to run, and the tables of ``docs/reliability.md`` made from it.

Input: ``CaseCount``s with their seed. Output: the file, and the page rewritten between its markers. Note: each row has
the date of its own run; a case that was not run keeps the counts it had, or has none.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

COUNTS = Path(__file__).with_name("counts.json")
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
_MAX_FAILURES = 20  # of a case, kept with their seeds


@dataclass(frozen=True, slots=True)
class CaseCount:
    """One row: a fault, what clasp promises, how often it was tried, and how often each outcome came.

    ``case``: its name for ``python -m faults`` or ``python -m faults.fuzz``. ``failures``: one line for each trial that
    broke the promise, with what repeats it.
    """

    fault: str
    promise: str
    case: str
    tried: int
    outcomes: Mapping[str, int]
    failures: tuple[str, ...] = field(default=())

    def counts(self) -> str:
        """``50 tried: 50 as an uninterrupted run``."""
        told = ", ".join(f"{count:,} {outcome}" for outcome, count in self.outcomes.items() if count)
        failed = f"; **{len(self.failures)} broke it**" if self.failures else ""
        return f"{self.tried:,}: {told}{failed}"


def record(table: str, rows: Mapping[str, CaseCount], seed: int, seconds: Mapping[str, float]) -> None:
    """Add rows of ``faults`` or ``fuzz`` to the file, and write the page anew."""
    with COUNTS.parent.joinpath("__init__.py").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # make faults and make fuzz may run side by side
        saved: dict[str, Any] = json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
        for name, row in rows.items():
            about = asdict(row) | {"failures": row.failures[:_MAX_FAILURES], "broken": len(row.failures)}
            about |= {"counts": row.counts(), "seed": seed, "seconds": round(seconds[name], 1), "machine": _machine()}
            saved.setdefault(table, {})[name] = about | {"date": datetime.date.today().isoformat()}
        COUNTS.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        text = PAGE.read_text(encoding="utf-8")
        for name, made in saved.items():
            begin, end = f"<!-- {name}: written by make {name} -->", f"<!-- end of {name} -->"
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n\n{_table(made)}\n\n{end}{rest.partition(end)[2]}"
        PAGE.write_text(text, encoding="utf-8")


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| fault | promise | case | tried: outcomes |", "|---|---|---|---|"]
    lines += [f"| {row['fault']} | {row['promise']} | `{row['case']}` | {row['counts']} |" for row in rows.values()]
    tried, broken = (sum(row[name] for row in rows.values()) for name in ("tried", "broken"))
    seeds = ", ".join(sorted({str(row["seed"]) for row in rows.values()}))
    dates = sorted({row["date"] for row in rows.values()})
    minutes = sum(row["seconds"] for row in rows.values()) / 60
    machines = "; ".join(sorted({row["machine"] for row in rows.values()}))
    told = f"{tried:,} trials, {broken} of which broke the promise, in {minutes:.1f} minutes"
    return "\n".join([*lines, "", f"{told}; seed {seeds}; {' to '.join({dates[0]: 0, dates[-1]: 0})}; {machines}."])


def _machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, Linux {platform.release()}"
