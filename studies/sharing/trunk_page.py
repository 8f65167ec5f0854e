"""The page of the study of a pre-trained trunk: costs, validation and test photos, rates tried, and what is missing.

Input: the records of the cells. Output: ``trunk.md``. Note: the paragraphs between the markers are hand-written, and
preserved when the page is made again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from studies.formatting import line, told
from studies.paired_intervals import Counts, difference, itself, measured
from studies.records import Record
from studies.sharing.page import BEGIN, END
from studies.sharing.trunk_grid import (
    CHOSEN_AT,
    ROWS,
    STEPS,
    TWO,
    Cell,
    Find,
    at,
    cells,
    chosen,
    shown,
    start_of,
    to_choose,
)

ASKED = {"tinyimagenet/top1": "Tiny-ImageNet", "cifar10/top1": "CIFAR-10"}

PAGE = """# One pre-trained trunk for photos and captions

    python -m studies.sharing.trunk --photos FOLDER --runs FOLDER

## What is found

{begin}
{verdict}
{end}

## What was done

DINOv2 ViT-S/14 at 56 px and MiniLM-L6, both frozen but for norms and low rank (8), which each modality has of its own,
in every block. "Two towers" shares nothing. On a trunk both modalities run through the blocks of one tower; of the
other they have the embeddings alone, of which patches, positions and a map of tokens train. Heads standardise their
features, are linear, 256 wide, and start in closed form from 2,000 photos that never train. Training: 8,000 photos of
160 classes (Tiny-ImageNet) with template captions, batches of {batch}, a cosine schedule for each number of steps,
{precision}, seed 0. Asked are photos that do not train, of the classes whose names train, and of CIFAR-10's ten
classes, none of whose names trains. The learning rate of a row is the best of two or three after {chosen_at} steps, by
log-likelihood on the validation photos of Tiny-ImageNet.

## Costs

{costs}

## Validation photos, top-1 %

{validation}

{test}## Learning rates, log-likelihood after {chosen_at} steps

{tried}

{missing}{made_with}
Intervals are 95 %, from a bootstrap over photos; differences are to two towers after as many steps, on the same photos.
"""


def write(find: Find, home: Path) -> Path:
    """Write the page into the folder."""
    file = home / "trunk.md"
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    kept = re.search(re.escape(BEGIN) + r"\n(.*?)\n?" + re.escape(END), before, re.S)
    test = _answers(find, lambda cell: cell.test_key)
    train = start_of(TWO).recipe.train
    text = PAGE.format(
        batch=train.batch_size,
        precision=train.precision,
        begin=BEGIN,
        end=END,
        verdict=kept.group(1) if kept else "Not written yet.",
        chosen_at=CHOSEN_AT,
        costs=_costs(find),
        validation=_answers(find, lambda cell: cell.key) or "Nothing is recorded yet.",
        test=f"## Test photos, top-1 %\n\n{test}\n\n" if test else "",
        tried=_tried(find),
        missing=_missing(find),
        made_with=_made_with(find),
    )
    file.write_text(text, encoding="utf-8")
    return file


def _costs(find: Find) -> str:
    lines = [line(["", "parameters", "trained", "MMACs of a photo and a caption of 8 tokens"]), line(["---"] * 4)]
    for row in ROWS:
        known = [record for cell in to_choose(row) if (record := find(cell.key)) is not None]
        if known:
            count = known[0]["counts"]["model"]
            macs = f"{known[0]['macs'] / 1e6:,.1f}"
            lines.append(line([row.name, f"{count['total']:,}", f"{count['trained']:,}", macs]))
    return "\n".join(lines)


def _answers(find: Find, key: Callable[[Cell], str]) -> str:
    """A line for every row and number of steps that has answers; empty where none has."""
    titles = [each for name in ASKED.values() for each in (name, f"{name}: difference")]
    lines = []
    for row in ROWS:
        for steps in STEPS:
            own, base = ([find(key(cell)) for cell in at(each, steps, find)] for each in (row, TWO))
            if not own or None in own:
                continue
            cells_ = [row.name, str(steps)]
            for name in ASKED:
                counts = [
                    Counts.of([each["answers"][name] for each in rows if each]) for rows in (own, base) if all(rows)
                ]
                cells_.append(told(measured(counts[:1], itself), itself))
                compared = row != TWO and len(counts) == 2
                cells_.append(told(measured(counts, difference), difference) if compared else "")
            lines.append(line(cells_))
    return "\n".join([line(["", "steps", *titles]), line(["---"] * (len(titles) + 2)), *lines]) if lines else ""


def _tried(find: Find) -> str:
    rates = sorted({rate for row in ROWS for rate in row.rates})
    lines = [line(["", *(f"{rate:g}" for rate in rates)]), line(["---"] * (len(rates) + 1))]
    for row in ROWS:
        found = {cell.rate: find(cell.key) for cell in to_choose(row)}
        known = {rate: f"{each['validation']:.3f}" for rate, each in found.items() if each}
        lines.append(line([row.name, *(known.get(rate, "–" if rate in row.rates else "") for rate in rates)]))
    return "\n".join(lines)


def _missing(find: Find) -> str:
    left = [str(cell) for cell in cells(find) if find(cell.key) is None]
    if unknown := [row.name for row in ROWS if chosen(row, find) is None]:
        left.append(f"longer runs of {', '.join(unknown)}")
    return f"**Not complete.** Missing: {'; '.join(left)}.\n\n" if left else ""


def _made_with(find: Find) -> str:
    keys = dict.fromkeys(key for cell in (*cells(find), *shown(find)) for key in (cell.key, cell.test_key))
    known: list[Record] = [record for key in keys if (record := find(key)) is not None]
    if not known:
        return ""
    machines = {", ".join(f"{key} {value}" for key, value in r["machine"].items() if key != "day") for r in known}
    days = sorted({record["machine"]["day"] for record in known})
    minutes = sum(sum(record["seconds"].values()) for record in known) / 60
    listed = "".join(f"- {each}\n" for each in sorted(machines))
    return (
        f"{listed}\n{' and '.join(days)}; {minutes:.0f} minutes in all beside other work, without what was stopped.\n"
    )
