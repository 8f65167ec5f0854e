"""A page for people: rows of thumbnails with titles and labels, as one PNG, in any script that the fonts have.

In go titles and encoded images, out comes a file and what was drawn with which fonts. Unusual: each stretch of text is
drawn with the first font that has its letters, and a script that no font has is named in brackets, not drawn as boxes.
With ``images`` and ``augment`` all that touches Pillow.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from clasp.data.images import ImageError, RGBColor, thumbnail
from clasp.report.terminal import printable
from clasp.types import UserError


class Thumbnail(NamedTuple):
    """One thumbnail: the encoded image (``None`` draws an empty place), its label, and whether it is a right answer."""

    image: bytes | None
    label: str
    correct: bool | None = None


class SheetRow(NamedTuple):
    """A title, its tiles (anything of the form of ``Thumbnail``), and a note in grey after the title."""

    title: str
    tiles: Sequence[tuple[bytes | None, str, bool | None]]
    note: str = ""


class ContactSheet(NamedTuple):
    """What was drawn: where, how large in pixels, with which fonts, and the scripts that no font had."""

    path: Path
    width: int
    height: int
    fonts: tuple[str, ...]
    missing: tuple[str, ...]


_SIDE, _SPACE, _STEP, _MARGIN = 128, 16, 164, 32  # pixels: tile, gap, tile with its label, border
_COLUMNS = 10  # tiles in a line, at most
_INK, _QUIET, _LINE, _GOOD, _EMPTY = (31, 35, 40), (101, 109, 118), (216, 222, 228), (31, 136, 61), (246, 248, 250)
_FONT_FOLDERS = (
    "~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts",
    "~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts",
    "~/AppData/Local/Microsoft/Windows/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
_FAMILIES = ("notosans", "dejavusans", "segoeui", "arialunicode")  # wide and quiet: tried before all others
_STYLES = "bold black heavy medium light thin italic oblique mono condensed serif math symbol emoji display".split()
# written from right to left, or with letters that change their shape or place: wrong unless Pillow has Raqm
_SHAPED = frozenset(
    "ARABIC HEBREW SYRIAC THAANA NKO DEVANAGARI BENGALI GURMUKHI GUJARATI ORIYA TAMIL TELUGU KANNADA MALAYALAM SINHALA "
    "THAI LAO TIBETAN MYANMAR KHMER MONGOLIAN BALINESE JAVANESE".split()
)


def contact_sheet(rows: Sequence[SheetRow], path: str | Path, *, fonts: str | Path | None = None) -> ContactSheet:
    """Draw rows of thumbnails with titles and labels into one PNG, right answers framed in green.

    Text may be in any script. Each stretch of it is drawn with the first font that has its letters, out of the folder
    ``fonts``, the system's and Pillow's own; where none has, the name of the script stands in brackets instead, and
    ``ContactSheet.missing`` names it. An unreadable image is an empty tile that says so.
    """
    pen = _TextRenderer(Path(fonts) if fonts is not None else None)
    columns = min(_COLUMNS, max([4, *(len(row.tiles) for row in rows)]))
    width = 2 * _MARGIN + columns * (_SIDE + _SPACE) - _SPACE
    heights = [38 + _STEP * math.ceil(len(row.tiles) / columns) + 22 for row in rows]
    page = Image.new("RGB", (width, 2 * _MARGIN + sum(heights) - 22), (255, 255, 255))
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        room = width - 2 * _MARGIN
        note, size = row.note if row.tiles else f"{row.note}   nothing found".strip(), 14
        aside = min(pen.width(note, size) + 14, room // 2) if note else 0
        end = pen.write(page, (_MARGIN, top + 20), row.title, 20, _INK, room - aside)
        pen.write(page, (end + 14, top + 20), note, size, _QUIET, max(0, aside - 14))
        for place, tile in enumerate(row.tiles):
            down, across = divmod(place, columns)
            _draw_tile(page, pen, (_MARGIN + across * (_SIDE + _SPACE), top + 38 + down * _STEP), Thumbnail(*tile))
        top += height
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, "PNG")
    return ContactSheet(path, *page.size, tuple(sorted(pen.used)), tuple(sorted(pen.missing)))


def _draw_tile(page: Image.Image, pen: _TextRenderer, place: tuple[int, int], tile: Thumbnail) -> None:
    """A rounded picture in its frame, the label centred below."""
    left, top = place
    picture, says = Image.new("RGB", (_SIDE, _SIDE), _EMPTY), "no image"
    if tile.image is not None:
        try:
            fitted = thumbnail(tile.image, _SIDE - 12)
            picture, says = Image.new("RGB", (_SIDE, _SIDE), (255, 255, 255)), ""
            picture.paste(fitted, (6, 6))
        except ImageError:
            says = "unreadable"
    page.paste(picture, place, _rounded(0))
    page.paste(_GOOD if tile.correct else _LINE, place, _rounded(3 if tile.correct else 1))
    pen.write(page, (left, top + _SIDE // 2 + 4), says, 12, _QUIET, _SIDE, align=0.5)
    pen.write(page, (left, top + _SIDE + 18), tile.label, 13, _INK if tile.correct else _QUIET, _SIDE, align=0.5)


@cache
def _rounded(line: int) -> Image.Image:
    """A smooth mask of a tile: filled for ``line`` 0, else its outline of so many pixels."""
    fine = Image.new("L", (4 * _SIDE, 4 * _SIDE))
    edge = (0, 0, 4 * _SIDE - 1, 4 * _SIDE - 1)
    ImageDraw.Draw(fine).rounded_rectangle(edge, 48, None if line else 255, 255, 4 * line)
    return fine.resize((_SIDE, _SIDE), Image.Resampling.BOX)


class _FontRun(NamedTuple):
    """A stretch of text in one font; ``None`` is the font that Pillow brings, which has little more than ASCII."""

    font: Path | None
    text: str


class _TextRenderer:
    """Writes text in whatever fonts have its letters, and remembers which it used and what none had."""

    def __init__(self, folder: Path | None) -> None:
        own = _font_files([folder]) if folder is not None else []
        if folder is not None and not own:
            raise UserError(f"no font (.ttf, .otf, .ttc) in {folder}")
        system = _font_files([Path(name).expanduser() for name in _FONT_FOLDERS])
        wide = [font for font in system if _rank(font)[0] < len(_FAMILIES)]
        self._fonts = [*own, *wide, None, *(font for font in system if font not in wide)]
        self.used: set[str] = set()
        self.missing: set[str] = set()

    def write(
        self,
        page: Image.Image,
        start: tuple[int, int],
        text: str,
        size: int,
        ink: RGBColor,
        room: int,
        *,
        align: float = 0.0,
    ) -> int:
        """Write on the baseline through ``start``, cut to ``room`` pixels; returns where the text ends.

        ``align`` is the share of the spare room that is left before the text: 0.5 centres it.
        """
        runs = self._fitting(self._drawable(text), size, room)
        x, y = start[0] + align * (room - _width(runs, size)), start[1]
        for run in runs:
            font = _font(run.font, size)
            ImageDraw.Draw(page).text((x, y), run.text, ink, font, anchor="ls")
            x += font.getlength(run.text)
            self.used.add(" ".join(part for part in font.getname() if part))
        return math.ceil(x)

    def draws(self, text: str) -> bool:
        """Whether every letter of the text is in some font."""
        return all(any(_has_glyphs(font, letter) for font in self._fonts) for letter in _graphemes(text))

    def width(self, text: str, size: int) -> int:
        """What ``write`` would take without a limit, pixels."""
        return math.ceil(_width(self._runs(self._drawable(text)), size))

    def _drawable(self, text: str) -> list[str]:
        """The letters with their marks; those that no font has give way to the name of their script, said once."""
        letters: list[str] = []
        said = ""  # the script that the text stands in for just now, spaces aside
        for letter in _graphemes(printable(text)):
            if any(_has_glyphs(font, letter) for font in self._fonts):
                letters.append(letter)
                said = said if letter == " " else ""
                continue
            script = _script(letter)
            bare = unicodedata.normalize("NFD", letter)[0]
            if script == "Latin" and bare.isascii():
                letters.append(bare)
                said = ""
            elif said and script in (said, "symbol"):  # more of the same, or its punctuation
                while letters[-1] == " ":
                    letters.pop()
            else:
                letters.append(f"[{script}]")
                said = script
            self.missing.add(said or script)
        return letters

    def _fitting(self, letters: list[str], size: int, room: int) -> list[_FontRun]:
        """All of the text, or as much of it and an ellipsis as fits into ``room`` pixels."""
        runs = self._runs(letters)
        if _width(runs, size) <= room:
            return runs
        # of a caption the beginning is kept, of a path or an id the end, which tells more
        path_like = " " not in letters and not set("/._0123456789").isdisjoint(letters)

        def cut(n: int) -> list[_FontRun]:
            return self._runs(["…", *letters[len(letters) - n :]] if path_like else [*letters[:n], "…"])

        fits = bisect_right(range(len(letters)), room, key=lambda n: _width(cut(n), size)) - 1
        return cut(fits) if fits >= 0 else []

    def _runs(self, letters: Sequence[str]) -> list[_FontRun]:
        """One run if one font has every letter, else a change of font wherever it must be."""
        whole = list(islice((font for font in self._fonts if all(_has_glyphs(font, letter) for letter in letters)), 1))
        runs: list[_FontRun] = []
        for letter in letters:
            candidates = [*whole, *(run.font for run in runs[-1:]), *self._fonts]
            font = next(font for font in candidates if _has_glyphs(font, letter))
            if runs and runs[-1].font == font:
                runs[-1] = _FontRun(font, runs[-1].text + letter)
            else:
                runs.append(_FontRun(font, letter))
        return runs


def _graphemes(text: str) -> list[str]:
    """Each character with the marks and joiners that follow it; one space for any white space."""
    letters: list[str] = []
    for character in " ".join(text.split()):
        if letters and unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"):
            letters[-1] += character
        else:
            letters.append(character)
    return letters


def _script(letter: str) -> str:
    """``Ethiopic``, ``Khmer``, ``CJK`` ...; ``symbol`` for what belongs to no script."""
    if unicodedata.category(letter[0])[0] not in "LM":
        return "symbol"
    word = unicodedata.name(letter[0], "symbol").split()[0]
    return word if word == "CJK" else word.capitalize()


def _font_files(folders: Sequence[Path]) -> list[Path]:
    """The upright regular fonts below the folders, those of many letters first."""
    files = [file for folder in folders if folder.is_dir() for file in folder.rglob("*")]
    fonts = [file for file in files if file.suffix.lower() in (".ttf", ".otf", ".ttc")]
    plain = [file for file in fonts if not any(style in file.stem.lower() for style in _STYLES)]
    return sorted(plain or fonts, key=_rank)


def _rank(font: Path) -> tuple[int, int, str]:
    stem = font.stem.lower().replace(" ", "")
    family = next((i for i, name in enumerate(_FAMILIES) if stem.startswith(name)), len(_FAMILIES))
    return family, len(stem), stem


def _width(runs: Sequence[_FontRun], size: int) -> float:
    return math.fsum(_font(run.font, size).getlength(run.text) for run in runs)


@lru_cache(maxsize=128)  # an open font is an open file
def _font(font: Path | None, size: int, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size, layout_engine=layout)
    assert isinstance(found, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return found


@cache
def _glyph(font: Path | None, character: str) -> bytes:
    """One character as drawn by itself, without the dotted circle that shaping puts under a lone mark."""
    cell = Image.new("L", (48, 40))
    ImageDraw.Draw(cell).text((16, 28), character, 255, _font(font, 16, ImageFont.Layout.BASIC), anchor="ls")
    return cell.tobytes()


@cache
def _has_glyphs(font: Path | None, letter: str) -> bool:
    """Whether the font has every character of a letter and, where the script needs it, they can be joined."""
    for character in letter:
        kind = unicodedata.category(character)
        if kind in ("Zs", "Cf"):
            continue
        if kind in ("Cc", "Cs") or (_script(character).upper() in _SHAPED and not features.check("raqm")):
            return False
        try:
            if _glyph(font, character) == _glyph(font, "\U0010ffff"):  # what a font draws for what it lacks
                return False
        except OSError:  # a damaged font, or one of fixed-size pictures
            return False
    return True
