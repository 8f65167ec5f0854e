"""The contact sheet: every tile is drawn, the right ones framed, and no script becomes empty boxes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clasp.report import text_rendering
from clasp.report.contact_sheet import SheetRow, SheetSection, Thumbnail, contact_sheet, sectioned_sheet
from clasp.report.text_rendering import TextRenderer
from clasp.types import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_sheet_shows_every_tile_and_frames_the_right_ones(tmp_path: Path) -> None:
    rows = [
        SheetRow("dog", [Thumbnail(encoded(Image.new("RGB", (9, 9), RED)), "a", True), (None, "b", False)], "en"),
        SheetRow("none like it", []),
        SheetRow("many", [(encoded(Image.new("RGB", (5, 9), BLUE)), str(i), None) for i in range(13)]),
        SheetRow("damaged", [(b"not an image", "c.jpg", False)]),
    ]
    sheet = contact_sheet(rows, tmp_path / "new folder" / "sheet.png")
    assert sheet.path == tmp_path / "new folder" / "sheet.png"
    with Image.open(sheet.path) as page:
        assert (page.size, page.mode) == ((sheet.width, sheet.height), "RGB")
        values = np.asarray(page).astype(int)

    def pixels(colour: tuple[int, int, int]) -> int:
        return int((values == colour).all(axis=2).sum())

    assert pixels(RED) > 116 * 116 - 100, "all but the corner below the check mark"
    assert 13 * 60 * 116 < pixels(BLUE) < 13 * 70 * 116
    frame = pixels((0, 114, 178))
    assert 4 * 4 * 100 < frame < 4 * 4 * 128 + 400  # one tile, four pixels wide, and the check mark
    assert 2 * 120 * 120 < pixels((246, 248, 250)) < 2 * 128 * 128  # the places of two absent images
    edges = values[[0, -1]].reshape(-1, 3), values[:, [0, -1]].reshape(-1, 3)
    assert all((edge == 255).all() for edge in edges)  # nothing runs off the page
    assert sheet.fonts and not sheet.missing


def test_sheet_without_fonts_names_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Pillow's own font alone: no box is drawn for a letter it lacks, and nobody is left guessing."""
    monkeypatch.setattr(text_rendering, "_FONT_FOLDERS", ())

    def drawn(title: str, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
        sheet = contact_sheet([SheetRow(title, [])], tmp_path / name)
        with Image.open(sheet.path) as page:
            return np.asarray(page), sheet.missing

    for text, said, scripts in (
        ("am ቡችላ ውሻ ok", "am [Ethiopic] ok", ("Ethiopic",)),
        ("កូនឆ្កែ", "[Khmer]", ("Khmer",)),
        ("पिल्ला 小狗，大狗", "[Devanagari] [CJK]", ("CJK", "Devanagari")),
        ("كلب", "[Arabic]", ("Arabic",)),
        ("café", "cafe", ("Latin",)),
        ("dog 🐶🐕", "dog [symbol]", ("symbol",)),
        ("a\x00b\ud800c", r"a\x00b\ud800c", ()),
    ):
        values, missing = drawn(text, "text.png")
        plainly, none = drawn(said, "said.png")
        np.testing.assert_array_equal(values, plainly, err_msg=said)
        assert (missing, none) == (scripts, ())


def test_sections_hold_their_rows_side_by_side(tmp_path: Path) -> None:
    red = [(encoded(Image.new("RGB", (9, 9), RED)), "1", True), (None, "2", False)]
    rows = [SheetRow("dog", red, "a note"), SheetRow("cat", red), SheetRow("fish", red)]
    sections = [
        SheetSection("one", ["a line"], rows, side=60, abreast=2),
        SheetSection("two", ["many words " * 40], rows[:1], side=200),
        SheetSection("three", ["no rows"], []),
    ]
    sheet = sectioned_sheet("all", ["what it is"], sections, tmp_path / "sheet.png")
    with Image.open(sheet.path) as page:
        values = np.asarray(page).astype(int)
    red_ink = (values == RED).all(axis=2)
    lines = np.flatnonzero(red_ink.any(axis=1))
    assert np.count_nonzero(np.diff(lines) > 1) == 2, "three lines of tiles, two of them of the first section"
    assert 3 * 40 * 40 < red_ink.sum() - 180 * 180 < 3 * 60 * 60
    assert (values[[0, -1]] == 255).all() and (values[:, [0, -1]] == 255).all()


def test_a_long_title_is_wrapped_into_three_lines_and_all_tiles_of_a_section_stand_below(tmp_path: Path) -> None:
    def heights(*titles: str) -> tuple[int, int]:
        """Of the page, and of its first red pixel."""
        rows = [SheetRow(title, [(encoded(Image.new("RGB", (9, 9), RED)), "", None)]) for title in titles]
        sheet = sectioned_sheet("t", [], [SheetSection("s", [], rows, side=200, abreast=2)], tmp_path / "a.png")
        with Image.open(sheet.path) as page:
            red = (np.asarray(page) == RED).all(axis=2)
        assert np.count_nonzero(np.diff(np.flatnonzero(red.any(axis=1))) > 1) == 0, "one line of tiles"
        return sheet.height, int(red.any(axis=1).argmax())

    one, two, three = heights("dog", "cat"), heights("dog", "a dog " * 6), heights("dog", "a dog " * 40)
    step = two[0] - one[0]
    assert step > 15 and (three[0] - one[0], three[1] - one[1], two[1] - one[1]) == (2 * step, 2 * step, step)
    assert heights("a" * 300, "dog") == one, "a word is not broken"


def test_fallback_title_where_no_font_has_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rendering, "_FONT_FOLDERS", ())

    def drawn(row: SheetRow) -> np.ndarray:
        sheet = sectioned_sheet("t", [], [SheetSection("s", [], [row])], tmp_path / "a.png")
        assert not sheet.missing
        with Image.open(sheet.path) as page:
            return np.asarray(page)

    np.testing.assert_array_equal(drawn(SheetRow("ដំរី", [], fallback="elephant")), drawn(SheetRow("elephant", [])))


@pytest.mark.skipif(not TextRenderer(None).draws("كلب שלום ŋẹ"), reason="no font with Arabic and Hebrew here")
def test_sheet_writes_from_right_to_left(tmp_path: Path) -> None:
    """Letters of a word in Arabic join: the word is narrower than its letters, and its first letter is rightmost."""
    sheet = contact_sheet([SheetRow("كلب", []), SheetRow("שלום", []), SheetRow("ŋẹ", [])], tmp_path / "a.png")
    assert sheet.missing == ()
    pen = TextRenderer(None)
    assert pen.width("كلب", 40) < sum(pen.width(letter, 40) for letter in "كلب")
    page = Image.new("RGB", (200, 80), (255, 255, 255))
    pen.write(page, (20, 60), "ול", 40, (0, 0, 0), 180)  # vav is narrow, lamed has a tall stroke: it must be left
    tall = np.argwhere(np.asarray(page)[:34, :, 0] < 128)[:, 1]
    low = np.argwhere(np.asarray(page)[50:, :, 0] < 128)[:, 1]
    assert tall.max() < low.max()


def test_long_text_is_cut() -> None:
    pen = TextRenderer(None)
    page = Image.new("RGB", (400, 40), (255, 255, 255))
    assert pen.write(page, (0, 30), "word " * 100, 20, (0, 0, 0), 300) <= 300
    assert (np.asarray(page)[:, 301:] == 255).all() and (np.asarray(page)[:, 250:300] < 255).any()
    said = "".join(run.text for run in pen._fitting(pen._drawable("a/very/long/path/to/IMG_0001.jpg"), 20, 220))
    assert said.startswith("…") and said.endswith("IMG_0001.jpg")
    assert pen._fitting(pen._drawable("long"), 20, 1) == []


def test_sheet_with_a_folder_without_fonts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no font"):
        contact_sheet([], tmp_path / "a.png", fonts=tmp_path)
