"""Text in any script, drawn with font fallback: each run of it with the first font that has its glyphs.

Input: text, a size and a place on a Pillow page. Output: ink, the fonts used and the scripts that no font covers. Note:
a script without a font is named in brackets instead of drawn as boxes. One of the four modules that import Pillow, with
``data.images``, ``data.augment`` and ``report.contact_sheet``.
"""

from __future__ import annotations

import math
import os
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from clasp.data.decoding import RGBColor
from clasp.errors import printable
from clasp.plain_types import UserError

_FONT_FOLDERS = (
    "~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts",
    "~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts",
    "~/AppData/Local/Microsoft/Windows/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
_FAMILIES = ("notosans", "dejavusans", "segoeui", "arialunicode")  # wide coverage: tried before all others
_STYLES = "bold black heavy medium light thin italic oblique mono condensed serif math symbol emoji display".split()
# right-to-left or with contextual shaping: rendered wrongly unless Pillow has Raqm
_SHAPED = frozenset(
    "ARABIC HEBREW SYRIAC THAANA NKO DEVANAGARI BENGALI GURMUKHI GUJARATI ORIYA TAMIL TELUGU KANNADA MALAYALAM SINHALA "
    "THAI LAO TIBETAN MYANMAR KHMER MONGOLIAN BALINESE JAVANESE".split()
)


class _FontRun(NamedTuple):
    """A run of text in one font; ``None`` is Pillow's built-in font, which has little more than ASCII."""

    font: Path | None
    text: str


class TextRenderer:
    """Draws text with font fallback; records the fonts used and the scripts without one."""

    def __init__(self, folder: Path | None) -> None:
        given = _font_files([folder]) if folder is not None else []
        if folder is not None and not given:
            raise UserError(f"no font (.ttf, .otf, .ttc) in {folder}")
        system = _font_files([Path(os.path.expanduser(name)) for name in _FONT_FOLDERS])
        wide = [font for font in system if _rank(font)[0] < len(_FAMILIES)]
        self._fonts = [*given, *wide, None, *(font for font in system if font not in wide)]
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
        """Draw on the baseline through ``start``, truncated to ``room`` pixels; returns the x at which the text ends.

        ``align`` is the fraction of the free space left of the text: 0.5 centres it.
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
        """Whether every grapheme of the text is in some font."""
        return all(any(_has_glyphs(font, letter) for font in self._fonts) for letter in _graphemes(text))

    def width(self, text: str, size: int) -> int:
        """The untruncated width of a text, pixels."""
        return math.ceil(_width(self._runs(self._drawable(text)), size))

    def _drawable(self, text: str) -> list[str]:
        """The graphemes; those that no font has are replaced by the name of their script, once per run."""
        letters: list[str] = []
        replaced = ""  # the script of the current replaced run, spaces aside
        for letter in _graphemes(printable(text)):
            if any(_has_glyphs(font, letter) for font in self._fonts):
                letters.append(letter)
                replaced = replaced if letter == " " else ""
                continue
            script = _script(letter)
            bare = unicodedata.normalize("NFD", letter)[0]
            if script == "Latin" and bare.isascii():
                letters.append(bare)
                replaced = ""
            elif replaced and script in (replaced, "symbol"):  # the same run, or its punctuation
                while letters[-1] == " ":
                    letters.pop()
            else:
                letters.append(f"[{script}]")
                replaced = script
            self.missing.add(replaced or script)
        return letters

    def _fitting(self, letters: list[str], size: int, room: int) -> list[_FontRun]:
        """The text, truncated with an ellipsis to fit into ``room`` pixels."""
        runs = self._runs(letters)
        if _width(runs, size) <= room:
            return runs
        # a caption keeps its beginning, a path or an id its end, which is more informative
        path_like = " " not in letters and not set("/._0123456789").isdisjoint(letters)

        def cut(n: int) -> list[_FontRun]:
            return self._runs(["…", *letters[len(letters) - n :]] if path_like else [*letters[:n], "…"])

        fits = bisect_right(range(len(letters)), room, key=lambda n: _width(cut(n), size)) - 1
        return cut(fits) if fits >= 0 else []

    def _runs(self, letters: Sequence[str]) -> list[_FontRun]:
        """A single run if one font has every grapheme, else as few changes of font as possible."""
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
    """Each character with its combining marks and joiners; white space is collapsed to single spaces."""
    letters: list[str] = []
    for character in " ".join(text.split()):
        if letters and unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"):
            letters[-1] += character
        else:
            letters.append(character)
    return letters


def _script(letter: str) -> str:
    """``Ethiopic``, ``Khmer``, ``CJK`` ...; ``symbol`` for characters of no script."""
    if unicodedata.category(letter[0])[0] not in "LM":
        return "symbol"
    word = unicodedata.name(letter[0], "symbol").split()[0]
    return word if word == "CJK" else word.capitalize()


def _font_files(folders: Sequence[Path]) -> list[Path]:
    """The upright regular fonts below the folders, those with wide coverage first."""
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


@lru_cache(maxsize=128)  # limits the number of open files
def _font(font: Path | None, size: int, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size, layout_engine=layout)
    assert isinstance(found, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return found


@cache
def _glyph(font: Path | None, character: str) -> bytes:
    """One character rendered alone, without the dotted circle that shaping adds to a lone mark."""
    cell = Image.new("L", (48, 40))
    ImageDraw.Draw(cell).text((16, 28), character, 255, _font(font, 16, ImageFont.Layout.BASIC), anchor="ls")
    return cell.tobytes()


@cache
def _has_glyphs(font: Path | None, letter: str) -> bool:
    """Whether the font has every character of a grapheme and, if the script needs shaping, Raqm is available."""
    for character in letter:
        kind = unicodedata.category(character)
        if kind in ("Zs", "Cf"):
            continue
        if kind in ("Cc", "Cs") or (_script(character).upper() in _SHAPED and not features.check("raqm")):
            return False
        try:
            if _glyph(font, character) == _glyph(font, "\U0010ffff"):  # the glyph for missing characters
                return False
        except OSError:  # a damaged font, or a bitmap font
            return False
    return True
