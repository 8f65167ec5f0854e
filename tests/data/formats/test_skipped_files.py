"""What each kind of source passes over: counted by reason, the same from a cached index, and named where it is all."""

import os
import tarfile
import unicodedata
from pathlib import Path

import pytest

from bad_inputs import refused
from clasp.data.checks import check_pairs
from clasp.data.formats.skipped_files import SkippedFiles, escape_name
from clasp.data.pairs import Pairs, list_images, open_pairs, skipped_lines
from clasp.types import Caption, UserError
from toydata import add_member, toys, write_classes, write_csv, write_folder, write_tar

TOYS = toys(6, seed=3)
UNREAD = "image of a format that is not read"
ORPHAN = "caption or label without an image of its name"
OTHER = "file that is neither image nor caption"
LINK = "link to a folder, which is not followed"


def captioned(folder: Path) -> Path:
    """Six good samples among: two formats that are not read, a lone caption, a link, a table, hidden files."""
    write_folder(TOYS, folder / "photos")
    for name in ("new.heic", "small.ICO"):
        (folder / "photos" / name).write_bytes(b"x")
        (folder / "photos" / name).with_suffix(".txt").write_text("a picture that is not read")
    (folder / "photos" / "gone.txt").write_text("its image was deleted")
    (folder / "photos" / "table.csv").write_text("x")
    elsewhere = write_folder(TOYS[:1], folder / "elsewhere")
    (folder / "photos" / "linked").symlink_to(elsewhere)
    for name in (".DS_Store", "._a.jpg", "Thumbs.db", "desktop.ini"):
        (folder / "photos" / name).write_bytes(b"x")
    (folder / "photos" / ".hidden").symlink_to(elsewhere)
    return folder / "photos"


def classes(folder: Path) -> Path:
    """Six images in class folders, and one of a format that is not read."""
    write_classes(TOYS, folder)
    (folder / f"a_{TOYS[0].colour}-{TOYS[0].shape}" / "new.heic").write_bytes(b"x")
    return folder


def shard(folder: Path) -> Path:
    """Six samples, one whose name has two dots, a fifo and a caption alone."""
    file = write_tar(TOYS, folder / "a.tar")
    with tarfile.open(file, "a") as tar:
        for name in ("v1.5 car.png", "v1.5 car.txt", "alone.txt", "deep/._a.png", "a.pdf"):
            add_member(tar, name, b"x")
        fifo = tarfile.TarInfo("pipe.jpg")
        fifo.type = tarfile.FIFOTYPE
        tar.addfile(fifo)
    return file


SOURCES = {
    "captioned folder": (
        captioned,
        {f"{UNREAD} (.heic)": 1, f"{UNREAD} (.ico)": 1, ORPHAN: 1, f"{OTHER} (.csv)": 1, LINK: 1},
    ),
    "class folders": (classes, {f"{UNREAD} (.heic)": 1}),
    "tar": (
        shard,
        {
            "name with several dots, which in a tar ends at the first": 2,
            ORPHAN: 1,
            f"{OTHER} (.pdf)": 1,
            "member that is not a file": 1,
        },
    ),
    "table": (lambda folder: write_csv(TOYS, folder), {}),
    "nothing but samples": (lambda folder: write_folder(TOYS, folder), {}),
}


@pytest.mark.parametrize("form", SOURCES)
def test_what_is_passed_over_is_counted_by_reason(form: str, tmp_path: Path):
    write, wanted = SOURCES[form]
    source = write(tmp_path / "data")
    for _ in range(2):  # built, then remembered
        pairs = open_pairs(source, cache=tmp_path / "cache")
        assert len(pairs) == 6 and pairs.skipped_files.counts == wanted
        assert pairs[:3].skipped_files == pairs.subset([1]).skipped_files == pairs.skipped_files
    report = check_pairs(pairs[:4], pairs[4:])
    assert report.facts["skipped_files"] == {str(source): wanted}
    looked = [finding.text for finding in report.findings if finding.level == "look" and "passed over" in finding.text]
    assert looked == skipped_lines(pairs[:4], pairs[4:]) and len(looked) == bool(wanted)


def test_a_line_has_the_commonest_first_and_an_example_of_each(tmp_path: Path):
    both = open_pairs(f"{shard(tmp_path / 'one')}::{classes(tmp_path / 'two')}")
    assert skipped_lines(both) == [f"{both.name}: {both.skipped_files}"]
    line = str(both.skipped_files)
    assert line.startswith(
        "passed over 2 × name with several dots, which in a tar ends at the first (the first: v1.5 car."
    )
    assert f"1 × {ORPHAN} (alone.txt)" in line and "new.heic)" in line and "\n" not in line


def test_where_all_is_passed_over_the_refusal_tells_why(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.heic").write_bytes(b"x")
    (folder / "a.txt").write_text("a")
    (folder / "more").symlink_to(write_folder(TOYS, tmp_path / "elsewhere"))
    refused(folder, "has no pairs", f"1 × {UNREAD} (.heic) (a.heic)", f"1 × {LINK} (more)")
    with pytest.raises(UserError, match=r"has no images.*link to a folder.*\(more\).*not read \(\.heic\) \(a\.heic\)"):
        list_images(folder)
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        add_member(tar, "v1.5 car.png", b"x")
    refused(file, "has no pairs", "name with several dots, which in a tar ends at the first (v1.5 car.png)")


def test_images_of_a_folder_are_listed_with_what_is_none(tmp_path: Path):
    found = list_images(captioned(tmp_path))
    assert len(found) == 6 and found.origin == os.path.realpath(tmp_path / "photos")
    wanted = {f"{UNREAD} (.heic)": 1, f"{UNREAD} (.ico)": 1, "file that is not an image (.csv)": 1, LINK: 1}
    assert found.skipped_files.counts == wanted


def test_a_folder_that_cannot_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, scan = write_folder(TOYS, tmp_path / "data"), os.scandir
    write_folder(TOYS[:1], folder / "shut")

    def denied(path: str) -> object:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    pairs = open_pairs(folder)
    assert len(pairs) == 6 and pairs.skipped_files.counts == {"folder that cannot be read": 1}


def test_names_that_no_terminal_takes_are_escaped():
    assert escape_name("é 日本.png") == "é 日本.png"
    assert escape_name("caf\udce9\n\x1b.png") == "caf\\udce9\\n\\x1b.png"
    skipped = SkippedFiles.of([("odd", "caf\udce9.txt")])
    assert SkippedFiles.from_array(skipped.to_array()) == skipped and "caf\\udce9.txt" in str(skipped)
    assert Pairs("none", [[]]).skipped_files == SkippedFiles()


@pytest.mark.parametrize("image, caption", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_whose_accents_are_encoded_in_two_ways_belong_together(image: str, caption: str, tmp_path: Path):
    name, said = (unicodedata.normalize(form, "réné été") for form in (image, caption))  # pyright: ignore[reportArgumentType]
    (tmp_path / "plain.png").write_bytes(b"x")
    (tmp_path / "plain.txt").write_text("plain")
    (tmp_path / f"{name}.png").write_bytes(b"y")
    (tmp_path / f"{said}.txt").write_text("with accents")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, f"{said}.txt", b"with accents")
        add_member(tar, f"{name}.png", b"y")
    pair = open_pairs(tmp_path / "a.tar")[0]
    (tmp_path / "a.tar").unlink()
    pairs = open_pairs(tmp_path)
    assert {pair.id: pair.captions for pair in pairs}[f"{name}.png"] == pair.captions == (Caption("with accents"),)
    assert not pairs.skipped_files


def test_two_images_whose_names_differ_in_encoding_alone_keep_their_own_captions(tmp_path: Path):
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é")
        (tmp_path / f"{name}.png").write_bytes(b"x")
        (tmp_path / f"{name}.txt").write_text(form)
    assert sorted(pair.captions[0].text for pair in open_pairs(tmp_path)) == ["NFC", "NFD"]
