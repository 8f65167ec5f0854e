"""Which room may import which: drawn from the import-linter contract ``floors`` in ``pyproject.toml``.

In: that contract, and one line about each room, below. Out: the annotated tree in README.md, between its two markers,
and ``docs/floors.svg``. ``python docs/floors.py`` writes both; ``tests/test_architecture.py`` compares them.
Note: a room without a line here, or a line without a room, is an error, so neither picture can be out of date.
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "floors.svg"
BEGIN = "<!-- floors: written by python docs/floors.py from pyproject.toml -->"
END = "<!-- end of floors -->"

ROOMS = {
    "cli": "arguments and help texts; each verb is a few lines",
    "commands": "what the verbs do: train, sweep, demo, doctor, evaluate, analyze, search, serve, export, report",
    "convert": "importers/: LilT and MS-CLIP checkpoints; exporters/: ONNX, transformers, sentence-transformers, hub",
    "serve": "HTTP API and search page over an index",
    "report": "HTML report, model card, sweep leaderboard, figures, tables, contact sheet, terminal output",
    "evaluation": "task registry, metrics, bootstrap intervals, retention/ of pre-trained features",
    "config": "recipe (TOML to checked settings), build (recipe to model), datasets, grid",
    "training": "loop, step, losses/, optimizer, grad_cache, run_folder, cost/, trackers/",
    "search": "engine, composed queries, filters, calibrated scores; stores: flat, qdrant-edge, Qdrant",
    "analysis": "CKA, activations, gradient agreement, weight drift",
    "models": "tower, dual_encoder, heads, tuning/, sharing/, transformer/, zoo/, features",
    "data": "pairs, formats/, images, tokenizer, loader, feature_cache/, checks, samples/",
    "errors": "UserError, without the import of torch",
    "plain_types": "Pair, Hit; protocols SearchModel, Store: what is imported where there is no torch",
    "types": "Batch, shape legend; protocols Encoder, Loss, Evaluator, Tracker; the names of plain_types",
}
_GROUPS = {  # fill and stroke by what a floor is for
    "#eef2ff #6366f1": ("cli", "commands"),
    "#fdf2f8 #db2777": ("convert", "serve", "report", "evaluation"),
    "#fffbeb #d97706": ("config",),
    "#ecfdf5 #059669": ("training", "search", "analysis"),
    "#eff6ff #2563eb": ("models", "data"),
    "#f8fafc #64748b": ("types", "plain_types", "errors"),
}


def read_floors() -> list[list[str]]:
    """The rooms of each floor, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"] == "floors")
    floors = [[room.strip() for room in layer.split("|")] for layer in layers]
    rooms = [room for floor in floors for room in floor]
    assert sorted(rooms) == sorted(ROOMS), f"docs/floors.py and the contract differ: {set(rooms) ^ set(ROOMS)}"
    return floors


def render_tree(floors: list[list[str]]) -> str:
    """The annotated tree of ``src/clasp`` with the number of each floor, as a fenced block."""
    lines = ["src/clasp/      floor"]
    for number, floor in zip(range(len(floors), 0, -1), floors, strict=True):
        lines += [f"  {_entry(room):<13} {number:>4}   {ROOMS[room]}" for room in floor]
    return "\n".join(["```text", *lines, "```"])


def render_readme(text: str) -> str:
    """README.md with the tree of today between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"README.md has no place for the floors: {BEGIN} and {END}"
    return f"{before}{begin}\n{render_tree(read_floors())}\n{end}{after}"


def render_svg(floors: list[list[str]]) -> str:
    """The floors as a picture: one row a floor, rooms of one floor side by side."""
    width, gap, left, y = 960, 8, 64, 16
    shapes = []
    for number, floor in zip(range(len(floors), 0, -1), floors, strict=True):
        each = (width - left - 16 - gap * (len(floor) - 1)) / len(floor)
        notes = [_wrap(ROOMS[room], int(each / 6.6)) for room in floor]
        row = 36 + 14 * max(map(len, notes))
        shapes.append(f'<text x="{left - 16}" y="{y + row / 2 + 5:.0f}" class="floor">{number}</text>')
        for column, (room, lines) in enumerate(zip(floor, notes, strict=True)):
            shapes += _box(room, lines, left + column * (each + gap), y, each, row)
        y += row + gap
    bottom = y - gap
    caption = "A room imports from lower floors only; rooms of one floor do not import each other (import-linter)."
    arrow = (
        f'<line x1="20" y1="20" x2="20" y2="{bottom - 10}" stroke="#475569" stroke-width="2"/>'
        f'<path d="M14 {bottom - 12} L20 {bottom} L26 {bottom - 12} Z" fill="#475569"/>'
        f'<text x="{left}" y="{bottom + 24}" class="note">{caption}</text>'
    )
    style = (
        "text{font-family:Helvetica,Arial,sans-serif;fill:#0f172a}.room{font-size:15px;font-weight:bold}"
        ".note{font-size:12px;fill:#334155}.floor{font-size:13px;fill:#64748b;text-anchor:end}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 40}" '
    head += f'viewBox="0 0 {width} {bottom + 40}" role="img" aria-label="The floors of src/clasp">'
    ground = f'<rect width="{width}" height="{bottom + 40}" fill="#ffffff"/>'
    return "\n".join([head, f"<style>{style}</style>", ground, arrow, *shapes, "</svg>\n"])


def _box(room: str, lines: list[str], x: float, y: int, width: float, height: int) -> list[str]:
    """A room: its name and its line."""
    fill, stroke = next(colours.split() for colours, rooms in _GROUPS.items() if room in rooms)
    box = f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{height}" rx="8" fill="{fill}" stroke="{stroke}"/>'
    name = f'<text x="{x + 14:.0f}" y="{y + 22}" class="room">{_entry(room)}</text>'
    notes = [
        f'<text x="{x + 14:.0f}" y="{y + 39 + 14 * place}" class="note">{escape(text)}</text>'
        for place, text in enumerate(lines)
    ]
    return [box, name, *notes]


def _entry(room: str) -> str:
    """The room as it lies in ``src/clasp``: a module or a folder."""
    return f"{room}.py" if (ROOT / "src" / "clasp" / f"{room}.py").is_file() else f"{room}/"


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` characters, cut at spaces."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


if __name__ == "__main__":
    README.write_text(render_readme(README.read_text("utf-8")), "utf-8")
    PICTURE.write_text(render_svg(read_floors()), "utf-8")
