"""A contact sheet: rows of thumbnails with titles and labels, as one PNG, in any script that the fonts cover.

Input: titles and encoded images, plain or in sections with a heading. Output: a file and a summary of what was drawn
with which fonts. Note: correct results are framed in a blue that colour-blind readers tell from grey (Okabe and Ito
2008), and marked. One of the four modules that import Pillow, with ``data.images``, ``data.augment`` and
``report.text_rendering``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from clasp.data.atomic_files import replace_file, translate_disk_errors
from clasp.data.decoding import ImageError, RGBColor, thumbnail
from clasp.report.text_rendering import TextRenderer


class Thumbnail(NamedTuple):
    """One thumbnail: the encoded image (``None`` draws an empty tile), its label, and whether it is a correct
    result."""

    image: bytes | None
    label: str
    correct: bool | None = None


class SheetRow(NamedTuple):
    """A title, its tiles (tuples like ``Thumbnail``), a note in grey, and what to write where no font has the title."""

    title: str
    tiles: Sequence[tuple[bytes | None, str, bool | None]]
    note: str = ""
    fallback: str = ""


class SheetSection(NamedTuple):
    """A heading, lines that explain it, and rows if any, ``abreast`` of them side by side, with tiles of ``side``
    pixels."""

    heading: str
    lines: Sequence[str]
    rows: Sequence[SheetRow]
    side: int = 128
    abreast: int = 1


class ContactSheet(NamedTuple):
    """The result: path, size in pixels, the fonts used, and the scripts that no font covers."""

    path: Path
    width: int
    height: int
    fonts: tuple[str, ...]
    missing: tuple[str, ...]


_SIDE, _SPACE, _MARGIN, _LABEL = 128, 16, 32, 20  # pixels: tile, gap, border, and the line of a label
_COLUMNS = 10  # maximum tiles per line
_INK, _QUIET, _LINE, _EMPTY = (31, 35, 40), (101, 109, 118), (216, 222, 228), (246, 248, 250)
_GOOD = (0, 114, 178)
_WHITE = (255, 255, 255)
_TITLE_SIZE, _HEADING_SIZE, _LINE_SIZE, _ROW_SIZE = 30, 22, 15, 18
_ROW_LINES, _ROW_STEP = 3, 22  # of a row's title: most lines, and pixels from one to the next
_GUTTER = 36  # pixels between rows side by side


def encode_png(picture: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """A picture that was computed, as the image of a tile."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def contact_sheet(rows: Sequence[SheetRow], path: str | Path, *, fonts: str | Path | None = None) -> ContactSheet:
    """Draw rows of thumbnails with titles and labels into one PNG, correct results framed and marked.

    Text may be in any script; fonts are those of the folder ``fonts``, the system's and Pillow's. Without one, the name
    of the script is drawn in brackets and added to ``ContactSheet.missing``. An unreadable image is an empty tile
    labelled "unreadable".
    """
    renderer = TextRenderer(Path(fonts) if fonts is not None else None)
    columns = min(_COLUMNS, max([4, *(len(row.tiles) for row in rows)]))
    room = columns * (_SIDE + _SPACE) - _SPACE
    step = _SIDE + _LABEL + _SPACE
    heights = [38 + step * math.ceil(len(row.tiles) / columns) + 22 for row in rows]
    page = Image.new("RGB", (2 * _MARGIN + room, 2 * _MARGIN + sum(heights) - 22), _WHITE)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        note, size = row.note if row.tiles else f"{row.note}   nothing found".strip(), 14
        note_width = min(renderer.width(note, size) + 14, room // 2) if note else 0
        end = renderer.write(page, (_MARGIN, top + 20), _title(row, renderer), 20, _INK, room - note_width)
        renderer.write(page, (end + 14, top + 20), note, size, _QUIET, max(0, note_width - 14))
        for index, tile in enumerate(row.tiles):
            down, across = divmod(index, columns)
            place = (_MARGIN + across * (_SIDE + _SPACE), top + 38 + down * step)
            _draw_tile(page, renderer, place, Thumbnail(*tile), _SIDE)
        top += height
    return _save(page, path, renderer)


def sectioned_sheet(
    title: str,
    lines: Sequence[str],
    sections: Sequence[SheetSection],
    path: str | Path,
    *,
    fonts: str | Path | None = None,
) -> ContactSheet:
    """Draw sections of rows below a title into one PNG: a heading and lines of text, then rows side by side.

    Each row has its title in up to three lines, its note on a line of its own, and one line of tiles. Lines of text are
    wrapped to the width of the page. Fonts and unreadable images as for ``contact_sheet``.
    """
    renderer = TextRenderer(Path(fonts) if fonts is not None else None)
    room = max(_section_width(section) for section in sections)
    lines = _wrapped(lines, renderer, room, _LINE_SIZE)
    sections = [_fitted(section, renderer, room) for section in sections]
    height = _text_height(_TITLE_SIZE, lines) + sum(_section_height(section) for section in sections)
    page = Image.new("RGB", (2 * _MARGIN + room, 2 * _MARGIN + height), _WHITE)
    top = _write_text(page, renderer, _MARGIN, (title, lines), _TITLE_SIZE, room)
    for section in sections:
        ImageDraw.Draw(page).line((_MARGIN, top, _MARGIN + room, top), _LINE, 2)
        below = _write_text(page, renderer, top + _SPACE, (section.heading, section.lines), _HEADING_SIZE, room)
        step = (room + _GUTTER) // section.abreast
        for index, row in enumerate(section.rows):
            down, across = divmod(index, section.abreast)
            place = (_MARGIN + across * step, below + down * _row_height(section))
            _draw_row(page, renderer, place, (section, row), step - _GUTTER)
        top += _section_height(section)
    return _save(page, path, renderer)


def _fitted(section: SheetSection, renderer: TextRenderer, room: int) -> SheetSection:
    """With its lines and the titles of its rows wrapped; the last line of a title is cut where it is drawn."""
    own = (room + _GUTTER) // section.abreast - _GUTTER
    rows = []
    for row in section.rows:
        lines = _wrapped([_title(row, renderer)], renderer, own, _ROW_SIZE)
        last = [" ".join(lines[_ROW_LINES - 1 :])] if len(lines) >= _ROW_LINES else []
        rows.append(row._replace(title="\n".join([*lines[: _ROW_LINES - 1], *last]), fallback=""))
    return section._replace(lines=_wrapped(section.lines, renderer, room, _LINE_SIZE), rows=rows)


def _wrapped(lines: Sequence[str], renderer: TextRenderer, room: int, size: int) -> list[str]:
    """Lines broken at spaces to at most ``room`` pixels."""
    wrapped: list[str] = []
    for line in lines:
        started = ""
        for word in line.split():
            longer = f"{started} {word}".strip()
            if started and renderer.width(longer, size) > room:
                wrapped.append(started)
                longer = word
            started = longer
        wrapped.append(started)
    return wrapped


def _draw_row(
    page: Image.Image, renderer: TextRenderer, place: tuple[int, int], what: tuple[SheetSection, SheetRow], room: int
) -> None:
    """A title, its note below, and its tiles in one line, at the same height in all rows of the section."""
    (left, top), (section, row) = place, what
    baseline = top + _ROW_SIZE
    for number, line in enumerate(row.title.split("\n")):
        baseline = top + _ROW_SIZE + number * _ROW_STEP
        renderer.write(page, (left, baseline), line, _ROW_SIZE, _INK, room)
    renderer.write(page, (left, baseline + 18), row.note, 13, _QUIET, room)
    top += _head_height(section)
    for index, tile in enumerate(row.tiles):
        _draw_tile(
            page, renderer, (left + index * (section.side + _gap(section.side)), top), Thumbnail(*tile), section.side
        )


def _title(row: SheetRow, renderer: TextRenderer) -> str:
    return row.fallback if row.fallback and not renderer.draws(row.title) else row.title


def _write_text(
    page: Image.Image, renderer: TextRenderer, top: int, text: tuple[str, Sequence[str]], size: int, room: int
) -> int:
    """A heading and the lines below it; returns the y below them."""
    heading, lines = text
    renderer.write(page, (_MARGIN, top + size), heading, size, _INK, room)
    for number, line in enumerate(lines):
        baseline = top + size + 12 + _LINE_SIZE + number * (_LINE_SIZE + 7)
        renderer.write(page, (_MARGIN, baseline), line, _LINE_SIZE, _QUIET, room)
    return top + _text_height(size, lines)


def _text_height(size: int, lines: Sequence[str]) -> int:
    return size + 12 + len(lines) * (_LINE_SIZE + 7) + 14


def _gap(side: int) -> int:
    return max(6, side // 10)


def _head_height(section: SheetSection) -> int:
    """Of the titles and notes of its rows."""
    return 44 + max((row.title.count("\n") for row in section.rows), default=0) * _ROW_STEP


def _row_height(section: SheetSection) -> int:
    return _head_height(section) + section.side + _LABEL + 18


def _section_height(section: SheetSection) -> int:
    lines = math.ceil(len(section.rows) / section.abreast)
    return _SPACE + _text_height(_HEADING_SIZE, section.lines) + lines * _row_height(section) + 8


def _section_width(section: SheetSection) -> int:
    tiles = max((len(row.tiles) for row in section.rows), default=1)
    row = tiles * (section.side + _gap(section.side)) - _gap(section.side)
    return section.abreast * (row + _GUTTER) - _GUTTER


def _save(page: Image.Image, path: str | Path, renderer: TextRenderer) -> ContactSheet:
    path = Path(path)
    with translate_disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as part:
            page.save(part, "PNG")
    return ContactSheet(path, *page.size, tuple(sorted(renderer.used)), tuple(sorted(renderer.missing)))


def _draw_tile(page: Image.Image, renderer: TextRenderer, place: tuple[int, int], tile: Thumbnail, side: int) -> None:
    """A rounded thumbnail in its frame, the label centred below; a correct one with a check mark in its corner."""
    left, top = place
    border = max(3, side * 6 // _SIDE)
    picture, message = Image.new("RGB", (side, side), _EMPTY), "no image"
    if tile.image is not None:
        try:
            fitted = thumbnail(tile.image, side - 2 * border)
            picture, message = Image.new("RGB", (side, side), _WHITE), ""
            picture.paste(fitted, (border, border))
        except ImageError:
            message = "unreadable"
    page.paste(picture, place, _rounded(side, 0))
    page.paste(_GOOD if tile.correct else _LINE, place, _rounded(side, 4 if tile.correct else 1))
    if tile.correct:
        _draw_check(page, (left + side - 15, top - 5))
    renderer.write(page, (left, top + side // 2 + 4), message, 12, _QUIET, side, align=0.5)
    renderer.write(page, (left, top + side + 16), tile.label, 12, _INK if tile.correct else _QUIET, side, align=0.5)


def _draw_check(page: Image.Image, place: tuple[int, int], size: int = 20, ink: RGBColor = _WHITE) -> None:
    """A white check mark on a disc of the colour of correct results, antialiased."""
    fine = 4 * size
    disc = Image.new("L", (fine, fine))
    ImageDraw.Draw(disc).ellipse((0, 0, fine - 1, fine - 1), 255)
    mark = Image.new("L", (fine, fine))
    corners = [(0.27 * fine, 0.53 * fine), (0.44 * fine, 0.69 * fine), (0.74 * fine, 0.34 * fine)]
    ImageDraw.Draw(mark).line(corners, 255, fine // 8, joint="curve")
    for colour, mask in ((_GOOD, disc), (ink, mark)):
        page.paste(colour, place, mask.resize((size, size), Image.Resampling.BOX))


@cache
def _rounded(side: int, line: int) -> Image.Image:
    """An antialiased mask of a tile: filled for ``line`` 0, else an outline of ``line`` pixels."""
    fine = Image.new("L", (4 * side, 4 * side))
    edge = (0, 0, 4 * side - 1, 4 * side - 1)
    ImageDraw.Draw(fine).rounded_rectangle(edge, 48 * side // _SIDE, None if line else 255, 255, 4 * line)
    return fine.resize((side, side), Image.Resampling.BOX)
