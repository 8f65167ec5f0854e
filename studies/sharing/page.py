"""The page of the study: the method, the tables, and a hand-written conclusion.

Input: the rows and the records of their cells. Output: README.md. Note: the paragraphs between the markers are
hand-written, and preserved when the page is regenerated. Rows are compared on the seeds that both have, so the tables
of an incomplete study are correct for the records so far.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from studies.formatting import line, told
from studies.paired_intervals import SEEN, Counts, Of, difference, itself, measured
from studies.records import Record
from studies.sharing.cells import TOKENS
from studies.sharing.grid import (
    MSCLIP,
    NOTHING,
    SEEDS,
    STEPS,
    Cell,
    Find,
    Row,
    at_equal_arithmetic,
    cells,
    chosen,
    to_time,
)

BEGIN, END = "<!-- written by a person; kept when this page is made again -->", "<!-- end -->"
TOP1, RECALL = "photos/top1", "drawings/recall@5"
ASKED = {TOP1: "photos, top-1 %", RECALL: "drawings, R@5 %", "drawings/recall@1": "drawings, R@1 %"}

PAGE = """# What two modalities may share

    python -m studies.sharing --photos FOLDER --emoji FOLDER

MS-CLIP (You et al., ECCV 2022) says that one transformer serves pictures and words best when attention and
feed-forward parts are shared and norms are not; that two small modules for the picture add to it; and that this is
better than two transformers, with fewer parameters. Here every row is trained anew, at the size of two cores.

## What is found

{begin}
{verdict}
{end}

## What was done

From scratch: {layers} layers {width} wide, pictures of {size} px in patches of {patch}, {steps} steps of {batch} pairs,
{precision}. {pairs} different pairs, each seen {turns} times: 1,700 photos of ten classes (CIFAR-10) with template
captions, and drawings of 372 concepts of the emoji corpus in three styles with their English names. Asked are 1,000
other photos for their class (chance 10 %), and a drawing of each concept in a style that never trained for its name
(chance 1.3 % for R@5). The learning rate, {rate}, is the best of {tried} for two rows,
nothing shared and MS-CLIP, on 300 photos and one more style that do not train either. Seeds {seeds} change weights,
order and crops. Weight decay is 0.05 for what is shared as for the rest, where the paper has 0.2 and 0.05.

Arithmetic is that of a forward pass of a picture and a caption of {tokens} tokens. Pairs a second are of training,
timed apart on an idle machine (`--speed`). Differences are to the first row of a table, on the same photos and seeds.

## For the same pairs

{same}

{could_see}

## For the same arithmetic as MS-CLIP

Rows whose forward pass costs something else, for as many steps as cost the same.

{equal}

![quality against parameters](sharing.png)

{missing}{made_with}
Intervals are 95 %, from a bootstrap over photos (drawings) and seeds together, paired where rows are compared.
"""


def write(rows: Sequence[Row], find: Find, home: Path) -> Path:
    """Write the page into the folder."""
    file = home / "README.md"
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    kept = re.search(re.escape(BEGIN) + r"\n(.*?)\n?" + re.escape(END), before, re.S)
    known = [record for cell in cells(rows, find) if (record := find(cell)) is not None]
    rate = chosen(find)
    timed = {cell.row.name: find(cell) for cell in to_time(rows)}
    speeds = {name: f"{record['pairs_per_second']:,.0f}" for name, record in timed.items() if record is not None}
    text = PAGE.format(
        begin=BEGIN,
        end=END,
        verdict=kept.group(1) if kept else "Not written yet.",
        **_sizes(Cell(MSCLIP, 1.0, STEPS, 0), known),
        rate=_rate(rate),
        tried=", ".join(dict.fromkeys(f"{cell.rate:g}" for cell in cells([NOTHING], find))),
        seeds=", ".join(map(str, SEEDS)),
        tokens=TOKENS,
        same="\n".join(_table(_same(rows, find), NOTHING.name, speeds)),
        could_see=_could_see(_same(rows, find)),
        equal="\n".join(_table(_equal(rows, find), MSCLIP.name, speeds)),
        missing=_missing(rows, find),
        made_with=_made_with(known),
    )
    file.write_text(text, encoding="utf-8")
    return file


def _sizes(cell: Cell, known: Sequence[Record]) -> dict[str, object]:
    """Sizes of a row from scratch and of its training data, for the page."""
    recipe = cell.recipe.to_dict()
    net, train = recipe["image"]["net"], recipe["train"]
    different = known[0]["different_pairs"] if known else None
    return {
        **{key: net[key] for key in ("layers", "width", "size", "patch")},
        **{"steps": cell.steps, "batch": train["batch_size"], "precision": train["precision"]},
        "pairs": f"{different:,}" if different else "–",
        "turns": f"{cell.steps * train['batch_size'] / different:.0f}" if different else "–",
    }


def _rate(rate: float | None) -> str:
    return "not yet chosen" if rate is None else f"{rate:g}"


By = dict[str, dict[int, Record]]
"""Records by the name of their row, then by seed"""


def _same(rows: Sequence[Row], find: Find) -> By:
    """Records of every row."""
    rate = chosen(find)
    if rate is None:
        return {}
    found = {row.name: _by_seed((Cell(row, rate, STEPS, seed) for seed in SEEDS), find) for row in rows}
    return {name: records for name, records in found.items() if records}


def _equal(rows: Sequence[Row], find: Find) -> By:
    """Records of MS-CLIP, and of the rows that were run again at its FLOPs."""
    rate = chosen(find)
    if rate is None:
        return {}
    found = {name: records for name, records in _same(rows, find).items() if name == MSCLIP.name}
    for row in rows:
        again = [at_equal_arithmetic(Cell(row, rate, STEPS, seed), rate, find) for seed in SEEDS]
        if records := _by_seed((cell for cell in again if cell is not None), find):
            found[row.name] = records
    return found


def _by_seed(asked: Iterator[Cell], find: Find) -> dict[int, Record]:
    return {cell.seed: record for cell in asked if (record := find(cell)) is not None}


def _table(found: By, first: str, speeds: Mapping[str, str]) -> list[str]:
    titles = ["", "parameters", "MMACs", "steps", "pairs/s", "seeds", *ASKED.values()]
    lines = [line([*titles, "photos: difference", "drawings: difference"]), line(["---"] * (len(titles) + 2))]
    for name, records in found.items():
        one = next(iter(records.values()))
        costs = [f"{one['counts']['model']['total']:,}", f"{one['macs'] / 1e6:,.1f}", str(one["steps"])]
        cells_ = [name, *costs, speeds.get(name, "–"), str(len(records))]
        cells_ += [told(measured(_counts([records], each), itself), itself) for each in ASKED]
        for each in (TOP1, RECALL):
            both = [records, found[first]] if first in found and name != first else []
            cells_.append(told(measured(_counts(both, each), difference), difference) if both else "")
        lines.append(line(cells_))
    return lines


def _counts(rows: Sequence[dict[int, Record]], name: str) -> list[Counts]:
    seeds = sorted(set.intersection(*(set(row) for row in rows)))
    return [Counts.of([row[seed]["answers"][name] for seed in seeds]) for row in rows]


def _could_see(found: By) -> str:
    if NOTHING.name not in found or len(found) < 2:
        return ""
    others = [records for name, records in found.items() if name != NOTHING.name]
    error = {
        each: max(_error([records, found[NOTHING.name]], each, difference) for records in others)
        for each in (TOP1, RECALL)
    }
    photos, drawings = (f"{100 * SEEN * error[each]:.1f}" for each in (TOP1, RECALL))
    return (
        f"A difference of {photos} points on photos and of {drawings} on drawings would have been found in four cases "
        "of five, where that is least likely."
    )


def _error(rows: Sequence[dict[int, Record]], name: str, of: Of) -> float:
    return measured(_counts(rows, name), of).error


def _missing(rows: Sequence[Row], find: Find) -> str:
    left = [cell for cell in cells(rows, find) if find(cell) is None]
    if not left:
        return ""
    some = "; ".join(map(str, left[:6])) + (" …" if len(left) > 6 else "")
    return f"**Not complete.** {len(left)} cells or more are missing: {some}.\n\n"


def _made_with(known: Sequence[Record]) -> str:
    machines = {", ".join(f"{key} {value}" for key, value in r["machine"].items() if key != "day") for r in known}
    days = sorted({record["machine"]["day"] for record in known})
    seconds = sum(sum(record["seconds"].values()) for record in known)
    when = "" if not days else days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return "".join(f"- {each}\n" for each in sorted(machines)) + f"\n{when}; {seconds / 60:.0f} minutes in all.\n"
