"""The figure of each claim, from the same counts as its table.

Input: a ``Found``. Output: a PNG next to the page. Bars are 95 % intervals over photos (concepts) and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # headless

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from studies.lilt.cells import Row
from studies.lilt.claim_records import At, Found
from studies.lilt.claims import Claim, Size, over
from studies.lilt.pages import stem
from studies.lilt.rows import FULL, HEADS, LANGUAGES, LAYERWISE, NAMES_FULL, UNTUNED, half
from studies.lilt.tables import LANGUAGE_SETS, PROBES, TOP5, counted, memory
from studies.paired_intervals import Measured, Of, difference, itself, measured

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})


def draw(claim: Claim, size: Size, found: Found, folder: Path) -> Path | None:
    """Write the figure into the folder; none before anything has been evaluated."""
    if not found.asked:
        return None
    figure = FIGURES[claim.name](found, size)
    file = folder / f"{stem(claim, size)}.png"
    figure.savefig(file, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file


def _methods(found: Found, size: Size) -> Any:
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for number, row in enumerate(size.methods, 1):
        at = (row.name, size.photos)
        if seen := _seen(found, [at], TOP5):
            trained, total = found.trained(at)
            share = 100 * trained / total
            marker = "s" if row.name == FULL.name else "^" if row.name in UNTUNED else "o"
            _point(axes, share, seen, marker, color=f"C{number % 10}", label=f"{number}  {row.name}")
            _name(axes, str(number), share, seen, left=number % 2 == 0)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    if seen := _seen(found, [(FULL.name, size.photos)], TOP5):
        for part, style, text in ((100, "--", "full"), (75, ":", "75 % of full")):
            axes.axhline(part * seen.value, color="grey", linewidth=0.8, linestyle=style)
            axes.annotate(text, (0.5, part * seen.value), (2, 2), textcoords="offset points", fontsize=7)
    axes.axvline(7, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlim=(0.5, 150), xlabel="trained, % of all parameters", ylabel="zero-shot top-5, %")
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    return figure


def _kept(found: Found, size: Size) -> Any:
    figure, all_axes = plt.subplots(1, len(PROBES), figsize=(9, 3.4), sharey=True)
    rows = [row for row in size.methods if (row.name, size.photos) in found.asked and row.name not in UNTUNED][::-1]
    for axes, (name, title) in zip(all_axes, PROBES.items(), strict=True):
        for place, row in enumerate(rows):
            if seen := _seen(found, [(row.name, size.photos), (HEADS.name, size.photos)], name, of=difference):
                _bar(axes, seen, place)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="change, points")
    all_axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
    return figure


def _scales(found: Found, size: Size) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, width_ratios=(2, 1))
    for row, marker in ((FULL, "s"), (LAYERWISE, "o"), (HEADS, "^")):
        _line(left, [(pairs, _seen(found, [(row.name, pairs)], TOP5)) for pairs in size.ladder], row, marker)
    left.set(xscale="log", xlabel="pairs", ylabel="zero-shot top-5, %", title="data")
    left.set_xticks(size.ladder, [f"{pairs:,}" for pairs in size.ladder])
    left.minorticks_off()
    left.legend(frameon=False)
    for row, marker in ((FULL, "s"), (LAYERWISE, "o")):
        ats = enumerate((each.name, size.photos) for each in (half(row), row))
        _line(right, [(place, _seen(found, [at], TOP5)) for place, at in ats], row, marker)
    right.set_xticks([0, 1], ["half the blocks", "all"])
    right.set(xlim=(-0.4, 1.4), title=f"model, {size.photos:,} pairs")
    return figure


def _languages(found: Found, size: Size) -> Any:
    figure, all_axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    rows = [row for row in LANGUAGES if row is not NAMES_FULL]
    for axes, cell in zip(all_axes, ("T3", "T4"), strict=True):
        for number, row in enumerate(rows):
            for place, spoken in enumerate(LANGUAGE_SETS.values()):
                names = [f"{cell}/{language}/recall@5" for language in spoken]
                ats = [(row.name, size.names), (NAMES_FULL.name, size.names)]
                if seen := _seen(found, ats, *names, of=difference):
                    shown: dict[str, Any] = {"color": f"C{number}", "label": row.name if place == 0 else None}
                    _bar(axes, seen, -place - 0.14 * (number - len(rows) / 2), **shown)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(title=cell, xlabel="R@5 against all blocks, points")
    all_axes[0].set_yticks([-place for place in range(len(LANGUAGE_SETS))], list(LANGUAGE_SETS))
    if all_axes[1].get_legend_handles_labels()[0]:
        all_axes[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _budgets(found: Found, size: Size) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.6), sharey=True)
    names = []
    for row, _ in size.budgeted:
        at = found.afforded(row, size)
        if at and (seen := _seen(found, [at], TOP5)):
            needs, color = memory(found.costs[row.name], size.batch) / 1e6, f"C{len(names)}"
            _point(left, len(names), seen, "o", color=color)
            _point(right, needs, seen, "o", color=color, label=row.name)
            names.append(row.name.replace(", ", ",\n") + f"\n{at[1]:,} pairs")
    left.set(ylabel="zero-shot top-5, %", title="for the same arithmetic", xlim=(-0.5, max(1, len(names)) - 0.5))
    left.set_xticks(range(len(names)), names, rotation=30, fontsize=7, ha="right", rotation_mode="anchor")
    right.set(xlabel="memory of a step, MB", title="and what it needs")
    if names:
        right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _epochs(found: Found, size: Size) -> Any:
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    for row, marker in zip(size.lasting, "sod", strict=True):
        ats = ((count, [(over(row, count, size).name, size.photos)]) for count in size.curve)
        _line(axes, [(count, _seen(found, at, TOP5)) for count, at in ats], row, marker)
    axes.set(xscale="log", xlabel=f"epochs of {size.photos:,} pairs", ylabel="zero-shot top-5, %")
    axes.set_xticks(size.curve, [str(count) for count in size.curve])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


FIGURES: dict[str, Callable[[Found, Size], Any]] = {
    "claim1": _methods,
    "claim2": _kept,
    "claim3": _scales,
    "claim4": _languages,
    "claim5": _budgets,
    "epochs": _epochs,
}


# --- parts -----------------------------------------------------------------------------------------------------------


def _seen(found: Found, rows: Sequence[At], *names: str, of: Of = itself) -> Measured | None:
    counts = counted(found, rows, names)
    return None if counts is None else measured(counts, of)


def _ends(seen: Measured) -> list[list[float]]:
    return [[100 * (seen.value - seen.low)], [100 * (seen.high - seen.value)]]


def _point(axes: Axes, x: float, seen: Measured, marker: str, **how: Any) -> None:
    shown: dict[str, Any] = {"color": "C0", "fmt": marker, "capsize": 2} | how
    axes.errorbar([x], [100 * seen.value], yerr=_ends(seen), **shown)


def _name(axes: Axes, text: str, x: float, seen: Measured, *, left: bool = False) -> None:
    place, align = ((-4, -9), "right") if left else ((4, 4), "left")
    axes.annotate(text, (x, 100 * seen.value), place, textcoords="offset points", fontsize=7, ha=align)


def _bar(axes: Axes, seen: Measured, y: float, **how: Any) -> None:
    shown: dict[str, Any] = {"color": "C0", "fmt": "o", "markersize": 4, "capsize": 2} | how
    axes.errorbar([100 * seen.value], [y], xerr=_ends(seen), **shown)


def _line(axes: Axes, points: Sequence[tuple[float, Measured | None]], row: Row, marker: str) -> None:
    known = [(x, seen) for x, seen in points if seen is not None]
    if known:
        ends = [[end for _, seen in known for end in _ends(seen)[side]] for side in (0, 1)]
        values = [100 * seen.value for _, seen in known]
        axes.errorbar([x for x, _ in known], values, yerr=ends, fmt=f"{marker}-", capsize=2, label=row.name)
