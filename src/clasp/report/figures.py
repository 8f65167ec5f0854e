"""Figures: evaluation results in, one PNG out. The only module that imports matplotlib.

Note: no model is needed, so a figure can be redrawn from ``results.jsonl``. Figures are made without ``pyplot``, which
has global state. Image and text differ by colour (two of Okabe and Ito's colour-blind-safe palette) and by marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clasp.evaluation.language_sets import macro_set
from clasp.evaluation.results import EvaluationResult
from clasp.report.tables import retention_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"image": "#0072B2", "text": "#D55E00"}
_MARKERS = {"image": "o", "text": "s"}
_GREY = "#666666"
_MAX_PROBES = 30  # legible rows; beyond this only means over languages are drawn
_INCHES_PER_PROBE, _INCHES_PER_PANEL = 0.3, 2.7
_MIN_DRIFT_RANGE = 0.1  # minimum range of the drift axes, so that rounding does not look like a drop
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}
_METRIC_LABELS = {
    "zeroshot_top1": "zero-shot accuracy",
    "retrieval_mean_recall": "image–text retrieval, mean recall",
    "image_knn": "image: k-NN",
    "text_recall@1": "text R@1",
    "captions_recall@1": "captions R@1",
}


def draw_retention(results: Sequence[EvaluationResult], path: Path) -> None:
    """Draw the rows of ``clasp eval RUN retention`` into ``path``, a file in the run folder.

    The probes before and after, the drift of each block and, where there are any, the points between base and tuned
    weights."""
    # inside: it takes half a second to import, and most evaluations draw nothing
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    probes = [result for result in results if "change" in result.metrics]
    if len(probes) > _MAX_PROBES:
        means = {result.task for result in probes if macro_set(result.language)}
        probes = [result for result in probes if result.task not in means or macro_set(result.language)]
    interpolation = [result for result in results if "alpha" in result.metrics]
    panels = 3 if interpolation else 2
    height = max(_INCHES_PER_PANEL * panels, 1.6 + _INCHES_PER_PROBE * len(probes))
    with rc_context(_STYLE):
        figure = Figure(figsize=(11, height), layout="constrained")
        figure.suptitle(f"Retention of pre-trained features: {path.absolute().parent.name}", fontweight="bold")
        grid = figure.add_gridspec(panels, 2, width_ratios=(1.15, 1))
        _draw_probes(figure.add_subplot(grid[:, 0]), probes, height)
        _draw_drift(figure.add_subplot(grid[0, 1]), results, "weights")
        _draw_drift(figure.add_subplot(grid[1, 1]), results, "cka")
        if interpolation:
            _draw_interpolation(figure.add_subplot(grid[2, 1]), interpolation)
        figure.savefig(path, dpi=150)


def _draw_probes(axes: Axes, probes: Sequence[EvaluationResult], height: float) -> None:
    """A row for each probe: an open marker before, a filled one after, each with its interval, and a bar at chance.

    ``height``: of the whole figure, inches.
    """
    for row, result in enumerate(probes):
        side = _side(result)
        for name, lift, face in (("before", -0.13, "white"), ("after", 0.13, _COLOURS[side])):
            value, interval = 100 * result.metrics[name], result.interval[name]
            axes.plot([100 * interval.low, 100 * interval.high], [row + lift] * 2, color=_COLOURS[side], lw=1, zorder=1)
            axes.plot(
                value, row + lift, _MARKERS[side], color=_COLOURS[side], markerfacecolor=face, markersize=6, zorder=2
            )
        axes.plot(100 * result.chance["before"], row, "|", color=_GREY, markersize=12, zorder=0)
    axes.set_yticks(range(len(probes)), [retention_label(result) for result in probes])
    axes.set_ylim(len(probes) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("accuracy, per cent (lines: 95 % intervals)")
    axes.set_title("Probes before and after alignment")
    axes.grid(axis="x", alpha=0.3)
    for label, marker, face in (("before alignment", "o", "white"), ("after", "o", _GREY), ("chance", "|", _GREY)):
        axes.plot([], [], marker, color=_GREY, markerfacecolor=face, label=label)
    below = -0.75 / height  # below the axes, where it covers no marker
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=3, frameon=False, borderaxespad=0)


def _draw_drift(axes: Axes, results: Sequence[EvaluationResult], measure: str) -> None:
    """A line for each tower over its blocks; for ``weights`` also the input part, at 0."""
    from matplotlib.ticker import MaxNLocator

    factor = {"weights": 100, "cka": 1}[measure]
    for side in _COLOURS:
        points = []
        for result in results:
            part = result.task.removeprefix(f"retention/{side}_drift/")
            number = 0 if part == "input" else int(part.removeprefix("block ")) if part.startswith("block ") else None
            if number is not None and measure in result.metrics:
                points.append((number, factor * result.metrics[measure]))
        numbers, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(
            numbers, values, f"{_MARKERS[side]}-", color=_COLOURS[side], label=f"{side} tower", markersize=4, lw=1.2
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    if measure == "weights":
        axes.set_title("Change of the base weights")
        axes.set_xlabel("block (0: input embedding)")
        axes.set_ylabel("relative norm, per cent")
        axes.set_ylim(0, max(axes.get_ylim()[1], _MIN_DRIFT_RANGE))
    else:
        axes.set_title("Similarity of states before and after")
        axes.set_xlabel("block")
        axes.set_ylabel("linear CKA")
        axes.set_ylim(min(axes.get_ylim()[0], 1 - _MIN_DRIFT_RANGE), 1 + _MIN_DRIFT_RANGE / 5)


def _draw_interpolation(axes: Axes, points: Sequence[EvaluationResult]) -> None:
    """From the base (0) to the run (1): alignment on the x axis, retention on the y axis."""
    names = [name for name in points[0].metrics if name != "alpha"]
    aligned, retained = names[0], names[1:]
    for name in retained:
        side = "image" if name.startswith("image") else "text"
        across, up = ([100 * result.metrics[each] for result in points] for each in (aligned, name))
        bounds = [[_error_bar(result, name, end) for result in points] for end in ("low", "high")]
        axes.errorbar(
            across, up, yerr=bounds, fmt=f"{_MARKERS[side]}-", color=_COLOURS[side], ecolor=f"{_COLOURS[side]}55",
            label=_METRIC_LABELS[name], markersize=5, lw=1.2,
        )  # fmt: skip
        for result, x, y in zip(points, across, up, strict=True) if name == retained[0] else ():
            alpha = result.metrics["alpha"]
            label = {0.0: "0 (base)", 1.0: "1 (run)"}.get(alpha, f"{alpha:g}")
            axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7.5, color=_GREY)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low), high + 0.3 * (high - low))  # room for the legend
    axes.set_title("Interpolation from base (0) to run (1)")
    axes.set_xlabel(f"{_METRIC_LABELS[aligned]}, per cent")
    axes.set_ylabel("retention, per cent")
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper center", ncols=2)


def _error_bar(result: EvaluationResult, name: str, end: str) -> float:
    """Distance from a value to an end of its interval, in per cent."""
    interval = result.interval[name]
    bound = {"low": interval.low, "high": interval.high}[end]
    return 100 * abs(bound - result.metrics[name])


def _side(result: EvaluationResult) -> str:
    return "image" if result.task.startswith("retention/image") else "text"
