"""The table of each claim, as lines of Markdown, and its minimum detectable difference.

Input: a ``Found``. Output: lines. Note: rows are compared on the seeds that both have, so that the tables of an
incomplete study are correct for the records so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from studies.formatting import line, told
from studies.lilt.cells import Row
from studies.lilt.claim_records import At, Found
from studies.lilt.claims import Size, over
from studies.lilt.emoji_names import HELD_OUT, TRAINED
from studies.lilt.prose import AS_GOOD, BUDGETS, COULD_SEE, KEPT
from studies.lilt.rows import FULL, HEADS, LANGUAGES, LAYERWISE, NAMES_FULL, WITHOUT_STEPS, half
from studies.paired_intervals import Counts, Measured, Of, difference, gained, itself, measured, pairs_to_reach, ratio

TOP5, TOP1 = "zero-shot/tinyimagenet/top5", "zero-shot/tinyimagenet/top1"
ELSEWHERE = {
    "zero-shot/cifar10/top1": "CIFAR-10 top-1 %",
    "retrieval/flickr8k/text_to_image/recall@5": "Flickr8k text→image R@5 %",
}
PROBES = {
    "kept/cifar10/knn": "k-NN",
    "kept/cifar10/linear": "linear probe",
    "kept/flickr8k/sentences": "sentences",
}
LANGUAGE_SETS = {
    "trained, rich": TRAINED["rich"],
    "trained, poor": TRAINED["poor"],
    "held out, rich": HELD_OUT["rich"],
    "held out, poor": HELD_OUT["poor"],
}


def methods(found: Found, size: Size) -> list[str]:
    """Claim 1: every method against full training."""
    titles = ["trained", "parameters", "%", "seeds", "top-5 %", "top-1 %", "top-5 against full", "of full, %"]
    table = _Table(found, [*titles, "of full's gain over heads, %", *ELSEWHERE.values(), "pairs/s", "peak MB"])
    full, heads = (FULL.name, size.photos), (HEADS.name, size.photos)
    for row in size.methods:
        at = (row.name, size.photos)
        if at in found.asked:
            trained, total = found.trained(at)
            table.begin(row.name, f"{trained:,}", f"{100 * trained / total:.2f}", table.seeds(at))
            table.tell([at], TOP5)
            table.tell([at], TOP1)
            table.against(at, full, TOP5)
            table.tell([at, full], TOP5, ratio, unless=at == full)
            table.tell([at, full, heads], TOP5, gained, unless=at in (full, heads))
            for name in ELSEWHERE:
                table.tell([at], name)
            table.add(*_speed(found, row))
    return [*table.lines, "", table.could_see("to full training")]


def kept(found: Found, size: Size) -> list[str]:
    """Claim 2: retention of the towers, before and after."""
    against = [f"{title} against full" for title in PROBES.values()]
    table = _Table(found, ["trained", "seeds", *(f"{title} % (change)" for title in PROBES.values()), *against])
    full, heads = (FULL.name, size.photos), (HEADS.name, size.photos)
    for row in size.methods:
        at = (row.name, size.photos)
        if at in found.asked and row.name not in WITHOUT_STEPS:
            table.begin(f"{row.name} (towers as they were)" if row.name == HEADS.name else row.name, table.seeds(at))
            for name in PROBES:
                change = f" ({told(table.measured([at, heads], name, difference), difference)})" if at != heads else ""
                table.add(told(table.measured([at], name, itself), itself, short=True) + change)
            for name in PROBES:
                table.against(at, full, name)
    return [*table.lines, "", KEPT, "", table.could_see("to full training")]


def scales(found: Found, size: Size) -> list[str]:
    """Claim 3: fewer and more pairs; half the blocks and all."""
    titles = ["pairs", "towers", "seeds", "full, top-5 %", "adapters + norms", "heads", "adapters + norms against full"]
    table = _Table(found, titles)
    for pairs in size.ladder:
        table.scale(f"{pairs:,}", "whole", (FULL.name, pairs), (LAYERWISE.name, pairs), (HEADS.name, pairs))
    small = [(half(row).name, size.photos) for row in (FULL, LAYERWISE)]
    table.scale(f"{size.photos:,}", "half the blocks", small[0], small[1], ("", 0))
    lines = [*table.lines, "", "What more of either adds to top-5, in points:", ""]
    for row in (FULL, LAYERWISE):
        few, many, whole = ((row.name, pairs) for pairs in (size.ladder[0], size.ladder[-1], size.photos))
        data = told(table.measured([many, few], TOP5, difference), difference)
        model = told(table.measured([whole, (half(row).name, size.photos)], TOP5, difference), difference)
        lines.append(f"- {row.name}: {data} from {few[1]:,} pairs to {many[1]:,}; {model} from half the blocks to all")
    return [*lines, "", table.could_see("between the two")]


def languages(found: Found, size: Size) -> list[str]:
    """Claim 4: trained and held-out languages, high- and low-resource."""
    lines: list[str] = []
    full = (NAMES_FULL.name, size.names)
    for cell, what in (("T4", "new concepts in a new style"), ("T3", "new concepts in the trained styles")):
        against = [f"{name}: against all blocks" for name in LANGUAGE_SETS]
        table = _Table(found, ["trained in the text tower", "parameters", "seeds", *LANGUAGE_SETS, *against])
        for row in LANGUAGES:
            at = (row.name, size.names)
            if at in found.asked:
                table.begin(row.name, f"{found.trained(at)[0]:,}", table.seeds(at))
                for spoken in LANGUAGE_SETS.values():
                    table.add(told(table.measured([at], _recalls(cell, spoken), itself), itself))
                for spoken in LANGUAGE_SETS.values():
                    table.against(at, full, *_recalls(cell, spoken))
        lines += [f"### {cell}: {what}, R@5 %", "", *table.lines, "", table.could_see("to all blocks"), ""]
    return [*lines, "### Each language: R@5 % on T3 / T4", "", *_each_language(found, size)]


def _each_language(found: Found, size: Size) -> list[str]:
    rows = [at for row in LANGUAGES if (at := (row.name, size.names)) in found.asked]
    table = _Table(found, ["language", "", *(name for name, _ in rows)])
    for title, spoken in LANGUAGE_SETS.items():
        for language in spoken:
            table.begin(language, title)
            for at in rows:
                each = (table.measured([at], _recalls(cell, [language]), itself) for cell in ("T3", "T4"))
                table.add(" / ".join(told(seen, itself, short=True) for seen in each))
    return table.lines


def budgets(found: Found, size: Size) -> list[str]:
    """Claim 5: different rows at equal FLOPs; and the cost of equal quality."""
    titles = ["towers and what trains", "trained", "MFLOPs a pair", "pairs", "seeds", "top-5 %", "against the smaller"]
    table = _Table(found, [*titles, "memory of a step, MB", "pairs/s", "peak MB"])
    small = found.afforded(half(FULL), size)
    for row, _ in size.budgeted:
        if small and (at := found.afforded(row, size)):
            cost = found.costs[row.name]
            trained = f"{cost['counts']['model']['trained']:,}"
            table.begin(row.name, trained, f"{cost['flops'] / 1e6:,.0f}", f"{at[1]:,}", table.seeds(at))
            table.tell([at], TOP5)
            table.against(at, small, TOP5)
            table.add(f"{memory(cost, size.batch) / 1e6:,.0f}", *_speed(found, row))
    said = BUDGETS.format(budget=f"{size.budget:,}", batch=size.batch, most=f"{size.most:,}")
    lines = [*table.lines, "", said, "", table.could_see("to the smaller in full")]
    return [*lines, "", "### As good as full training", "", *_as_good(found, size)]


def _as_good(found: Found, size: Size) -> list[str]:
    """Pairs, FLOPs and time of full and layerwise tuning of the whole towers to reach a given quality."""
    goal = (FULL.name, size.photos)
    table = _Table(found, ["whole towers", "seeds", "pairs", "GFLOPs", "seconds"])
    for row in (FULL, LAYERWISE):
        rungs = [(row.name, pairs) for pairs in size.ladder]
        seen = table.measured([goal, *rungs], TOP5, pairs_to_reach(size.ladder))
        table.begin(row.name, table.seeds(goal, *rungs))
        cost, speed = found.costs.get(row.name), found.speeds.get(row.name)
        table.add(_pairs(seen, 1), _pairs(seen, cost["flops"] / 1e9 if cost else None))
        table.add(_pairs(seen, 1 / speed["pairs_per_second"] if speed else None))
    return [*table.lines, "", AS_GOOD.format(pairs=f"{size.photos:,}")]


def _pairs(seen: Measured | None, each: float | None) -> str:
    """A number of pairs times a cost per pair; without an upper end where a tenth of the resamples never reach it."""
    if seen is None or each is None:
        return "–"
    value, low, high = (f"{number * each:,.0f}" for number in (seen.value, seen.low, seen.high))
    if np.isnan(seen.value):
        return "not reached"
    return f"{value} ({low} to {high})" if seen.known > 0.9 else f"{value} ({low} to more than was tried)"


def epochs(found: Found, size: Size) -> list[str]:
    """The curve over epochs: full training, adapters and norms, low rank and norms on the same pairs."""
    names = [row.name for row in size.lasting]
    titles = [
        "epochs",
        "seeds",
        *(f"{name}, top-5 %" for name in names),
        *(f"{name} against full" for name in names[1:]),
    ]
    table = _Table(found, titles)
    for count in size.curve:
        full, *others = ((over(row, count, size).name, size.photos) for row in size.lasting)
        table.begin(str(count), table.seeds(full, *others))
        for at in (full, *others):
            table.tell([at], TOP5)
        for at in others:
            table.against(at, full, TOP5)
    return [*table.lines, "", table.could_see("to full training")]


TABLES: dict[str, Callable[[Found, Size], list[str]]] = {
    "claim1": methods,
    "claim2": kept,
    "claim3": scales,
    "claim4": languages,
    "claim5": budgets,
    "epochs": epochs,
}


# --- parts -----------------------------------------------------------------------------------------------------------


class _Table:
    """A table builder; records the largest standard error of its differences."""

    def __init__(self, found: Found, titles: Sequence[str]):
        self.lines = [line(titles), line(["---"] * len(titles))]
        self._found, self._cells, self._least = found, [""], 0.0

    def begin(self, *cells: str) -> None:
        self._cells = list(cells)
        self.lines.append(line(self._cells))

    def add(self, *cells: str) -> None:
        self._cells += cells
        self.lines[-1] = line(self._cells)

    def seeds(self, *rows: At) -> str:
        return str(len(self._found.seeds(rows)))

    def measured(self, rows: Sequence[At], names: str | Sequence[str], of: Of) -> Measured | None:
        counts = counted(self._found, rows, [names] if isinstance(names, str) else names)
        return None if counts is None else measured(counts, of)

    def tell(self, rows: Sequence[At], name: str, of: Of = itself, *, unless: bool = False) -> None:
        self.add("" if unless else told(self.measured(rows, name, of), of))

    def against(self, at: At, other: At, *names: str) -> None:
        """The difference of two rows; none of a row and itself."""
        seen = self.measured([at, other], names, difference) if at != other else None
        self.add("" if at == other else told(seen, difference))
        self._least = max(self._least, seen.could_see if seen else 0.0)

    def scale(self, pairs: str, towers: str, full: At, layerwise: At, heads: At) -> None:
        """A line of the table of claim 3."""
        self.begin(pairs, towers, self.seeds(full, layerwise))
        for at in (full, layerwise, heads):
            self.tell([at], TOP5, unless=not at[0])
        self.against(layerwise, full, TOP5)

    def could_see(self, to: str) -> str:
        return COULD_SEE.format(to=to, points=100 * self._least) if self._least else ""


def counted(found: Found, rows: Sequence[At], names: Sequence[str]) -> list[Counts] | None:
    """Counts of some rows, pooled over several metrics on the same groups."""
    each = [counts for name in names if (counts := found.counts(rows, name)) is not None]
    return [sum((counts[row] for counts in each[1:]), each[0][row]) for row in range(len(rows))] if each else None


def memory(cost: dict, batch: int) -> float:
    """Memory of a step with a batch of this size, bytes, from the counted costs of a row."""
    return cost["fixed_bytes"] + batch * cost["kept_bytes"]


def _recalls(cell: str, spoken: Sequence[str]) -> list[str]:
    return [f"{cell}/{language}/recall@5" for language in spoken]


def _speed(found: Found, row: Row) -> list[str]:
    record = found.speeds.get(row.name)
    if record is None:
        return ["–", "–"]
    peak = record["peak_bytes"]
    return [f"{record['pairs_per_second']:,.1f}", "–" if peak is None else f"{peak / 1e6:,.0f}"]
