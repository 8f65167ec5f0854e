"""The page of each claim: the claim, the method, its table, and a hand-written conclusion.

Input: a ``Found``. Output: ``CLAIM.md``. Note: the paragraph between the markers is hand-written, and preserved when
the page is regenerated.
"""

from __future__ import annotations

import re
from pathlib import Path

from studies.formatting import line
from studies.lilt.claim_records import Found
from studies.lilt.claims import LARGER, Claim, Size
from studies.lilt.emoji_names import HELD_OUT, TRAINED
from studies.lilt.photos import SMALL, WHOLE
from studies.lilt.prose import INTERVALS, NAMES, PHOTOS, PHOTOS_8000, SAYS, TITLES
from studies.lilt.tables import TABLES

from clasp.errors import counted

BEGIN, END = "<!-- written by a person; kept when this page is made again -->", "<!-- end -->"


def stem(claim: Claim, size: Size) -> str:
    """The name of a claim's page and figure."""
    return claim.name if size.name == "small" else f"{claim.name}-{size.name}"


def write(claim: Claim, size: Size, found: Found, folder: Path) -> Path:
    """Write the page into the folder."""
    file = folder / f"{stem(claim, size)}.md"
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    file.write_text(page(claim, size, found, before), encoding="utf-8")
    return file


def page(claim: Claim, size: Size, found: Found, before: str) -> str:
    """The whole page; ``before`` is the existing page."""
    folder = "--emoji FOLDER" if claim.world == "names" else "--photos FOLDER"
    larger = " --larger" if size is LARGER else ""
    parts = [
        f"# {TITLES[claim.name]}",
        SAYS[claim.name],
        f"    python -m studies.lilt {claim.name} {folder}{larger}",
        "## Does it hold at this size?",
        f"{BEGIN}\n{_verdict(before)}\n{END}",
        "## What was done",
        _done(claim, size),
        *_missing(found),
        "## Results",
        "\n".join(TABLES[claim.name](found, size)),
        f"![{TITLES[claim.name]}]({stem(claim, size)}.png)",
        *_rates(found),
        "## Made with",
        *_made_with(claim, found),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return re.sub(r"\n{3,}", "\n\n", text)


def _verdict(before: str) -> str:
    kept = re.search(re.escape(BEGIN) + r"\n(.*?)\n?" + re.escape(END), before, re.S)
    return kept.group(1) if kept else "Not written yet."


def _done(claim: Claim, size: Size) -> str:
    pairs = f"{size.pairs(claim.world):,}"
    if claim.world == "names":
        return NAMES.format(trained=_listed(TRAINED), held=_listed(HELD_OUT), pairs=pairs)
    if size is LARGER:
        return PHOTOS_8000.format(held=f"{WHOLE.held:,}", pairs=pairs)
    return PHOTOS.format(held=f"{SMALL.held:,}", pairs=pairs)


def _listed(sets: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(language for languages in sets.values() for language in languages)


def _missing(found: Found) -> list[str]:
    if not found.missing:
        return []
    some = "; ".join(str(cell) for cell in found.missing[:8]) + (" …" if len(found.missing) > 8 else "")
    waiting = ", ".join(choice.row for choice in found.rates if choice.rate is None)
    more = f" More will follow in rows whose learning rate is still being chosen: {waiting}." if waiting else ""
    return [f"**Not complete.** {counted(len(found.missing), 'cell')} missing: {some}.{more}"]


def _rates(found: Found) -> list[str]:
    if not found.rates:
        return []
    lines = [line(["row", "tried: validation", "chosen"]), line(["---"] * 3)]
    for choice in found.rates:
        told = ", ".join(f"{rate:g}: {value:.3f}" for rate, value in sorted(choice.tried.items()))
        end = " (the end of those tried)" if choice.rate in (min(choice.tried), max(choice.tried)) else ""
        lines.append(line([choice.row, told, "–" if choice.rate is None else f"{choice.rate:g}{end}"]))
    return ["## Learning rates", "\n".join(lines)]


def _made_with(claim: Claim, found: Found) -> list[str]:
    intervals = INTERVALS.format(groups="concepts" if claim.world == "names" else "photos")
    records = [record for of_row in found.asked.values() for record in of_row.values()]
    if not records:
        return [intervals]
    machines = {
        ", ".join(f"{key} {value}" for key, value in record["machine"].items() if key != "day") for record in records
    }
    days = sorted({record["machine"]["day"] for record in records})
    seconds = sum(sum(record["seconds"].values()) for record in records)
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    spent = f"{when}. The cells in the table took {seconds / 60:.0f} minutes; they may have run beside other work."
    return ["\n".join(f"- {machine}" for machine in sorted(machines)), spent, intervals]
