"""The figure of the study: quality against parameters, from the same counts as the table.

Input: the rows and the records of their cells. Output: sharing.png. Bars are 95 % intervals over photos and seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # headless

import matplotlib.pyplot as plt
from studies.paired_intervals import Counts, itself, measured
from studies.sharing.grid import SEEDS, STEPS, Cell, Find, Row, chosen
from studies.sharing.page import RECALL, TOP1

TITLES = {TOP1: "photos: zero-shot top-1, %", RECALL: "drawings in a new style: R@5, %"}


def draw(rows: Sequence[Row], find: Find, home: Path) -> Path | None:
    """Write the figure into the folder; none before they have a learning rate."""
    rate = chosen(find)
    if rate is None:
        return None
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, both = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharex=True)
    for axes, name in zip(both, TITLES, strict=True):
        for number, row in enumerate(rows, 1):
            records = [find(Cell(row, rate, STEPS, seed)) for seed in SEEDS]
            known = [record for record in records if record is not None]
            if known:
                seen = measured([Counts.of([record["answers"][name] for record in known])], itself)
                at, value = known[0]["counts"]["model"]["total"] / 1e6, 100 * seen.value
                reach = [[value - 100 * seen.low], [100 * seen.high - value]]
                label = f"{number}  {row.name}"
                marker, below = "o" if number <= 10 else "s", number % 2 == 0 and number < 14
                axes.errorbar(at, value, reach, fmt=marker, ms=4, lw=1, color=f"C{number % 10}", label=label)
                place = (-5, -9) if below else (5, 3)  # of two at one place, one label each side
                axes.annotate(
                    str(number),
                    (at, value),
                    place,
                    textcoords="offset points",
                    fontsize=8,
                    ha="right" if below else "left",
                )
        axes.set_xlabel("million parameters")
        axes.set_title(TITLES[name], loc="left", fontsize=9)
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    file = home / "sharing.png"
    figure.savefig(file, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return file
