"""Elements of a self-contained HTML page: tables, figures, sections, the page. Input: plain strings. Output: ``Html``.

Note: a text of the user becomes ``Html`` by ``escaped`` only, which also escapes control characters and isolates the
direction of writing, so that no file name or caption can change the page. The page has no script and requests nothing.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import NewType

from clasp.errors import printable
from clasp.report.tables import AnnotatedTable

Html = NewType("Html", str)
"""Markup, in which all text is escaped"""

_EMPTY = Html("")
# no source for anything but what is in the file itself: a second lock beside the escaping
_LONG_WORD = 28  # characters from which a word may be broken anywhere
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def escaped(text: str) -> Html:
    """A text as markup: what it reads as, on one line."""
    return Html(html.escape(printable(text)))


def joined(parts: Iterable[Html], between: str = "") -> Html:
    """Several pieces of markup as one."""
    return Html(between.join(parts))


def paragraph(content: Html, kind: str = "") -> Html:
    """A paragraph; ``kind`` is its class in the style sheet: ``note``, ``missing``."""
    return Html(f'<p class="{kind}">{content}</p>' if kind else f"<p>{content}</p>")


def missing(text: str) -> Html:
    """A line on a part that a run lacks."""
    return paragraph(escaped(text), "missing")


def missing_in(labels: Sequence[str], text: str) -> Html:
    """The same line for all runs that lack a part; nothing where none does."""
    return missing(f"{', '.join(labels)}: {text}") if labels else _EMPTY


def html_table(caption: str, table: AnnotatedTable, marks: Sequence[Html] = ()) -> Html:
    """A table with a caption and a header for every row and column; columns in which every cell is a number are
    aligned to the right. ``marks``: markup before the label of each row, such as the swatch of a run. Notes are below.
    """
    numeric = [_is_numeric([row[place] for row in table.rows]) for place in range(len(table.columns))]
    head = joined(
        _cell("th", title, numeric=number, scope="col") for title, number in zip(table.columns, numeric, strict=True)
    )
    lines = []
    for place, row in enumerate(table.rows):
        label = _cell("th", row[0], marks[place] if marks else _EMPTY, scope="row")
        cells = (_cell("td", cell, numeric=number) for cell, number in zip(row[1:], numeric[1:], strict=True))
        lines.append(f"<tr>{label}{joined(cells)}</tr>")
    notes = joined(paragraph(escaped(note), "note") for note in table.notes)
    return Html(
        f'<div><div class="wide" tabindex="0" role="region" aria-label="{escaped(caption)}">'
        f"<table><caption><span>{escaped(caption)}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{notes}</div>"
    )


def folded(summary: str, content: Html) -> Html:
    """Content that is shown when its summary is opened; left out on paper."""
    return Html(f"<details><summary>{escaped(summary)}</summary>{content}</details>")


def figure(caption: str, drawing: Html, data: AnnotatedTable | None = None) -> Html:
    """A drawing with its caption and, folded, the table of its numbers."""
    numbers = _EMPTY if data is None or not data.rows else folded("numbers", html_table(caption, data))
    return Html(f"<figure><figcaption>{escaped(caption)}</figcaption>{drawing}{numbers}</figure>")


def figure_row(figures: Iterable[Html]) -> Html:
    """Figures side by side, as many as there is room for."""
    return Html(f'<div class="row">{joined(figures)}</div>')


def beside(parts: Iterable[Html]) -> Html:
    """A table and a figure beside each other where there is room for both, below each other otherwise."""
    return Html(f'<div class="beside">{joined(parts)}</div>')


def picture(file: Path, description: str) -> Html:
    """A PNG inside the page; ``description`` is its text alternative."""
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return Html(f'<img src="data:image/png;base64,{data}" alt="{escaped(description)}">')


def section(title: str, anchor: str, contents: Iterable[Html]) -> Html:
    """A section of the page with its heading."""
    return Html(f'<section id="{anchor}"><h2>{escaped(title)}</h2>{joined(contents)}</section>')


def html_page(title: str, contents: Iterable[Html]) -> str:
    """The whole file."""
    style = resources.files("clasp.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n<h1>{escaped(title)}</h1>\n"
        + "\n".join(contents)
        + "\n</main>\n</body>\n</html>\n"
    )


def _cell(tag: str, text: str, before: Html = _EMPTY, *, numeric: bool = False, scope: str = "") -> Html:
    """A cell; its text may be broken after a slash, and a long word anywhere."""
    long = any(len(word) > _LONG_WORD for word in text.replace("/", " ").split())
    kinds = " ".join(name for name, holds in (("number", numeric), ("long", long)) if holds)
    attributes = (f' scope="{scope}"' if scope else "") + (f' class="{kinds}"' if kinds else "")
    return Html(f"<{tag}{attributes}>{before}<bdi>{escaped(text).replace('/', '/<wbr>')}</bdi></{tag}>")


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether every cell starts as a number does, or is empty; not all are empty."""
    filled = [cell for cell in cells if cell]
    return bool(filled) and all(cell.lstrip("+-−")[:1].isdigit() for cell in filled)
