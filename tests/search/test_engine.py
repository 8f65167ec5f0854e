"""The engine with an encoder whose answers can be seen: an image is its mean colour, a word the colour it names."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clasp.commands.search import contact_sheet_rows
from clasp.data.formats.hugging_face import ArrowSource
from clasp.data.formats.zip_members import ZipSource
from clasp.data.pairs import FileSource, list_images, open_pairs
from clasp.report.contact_sheet import contact_sheet
from clasp.search.engine import SearchEngine, UpdatableStore
from clasp.search.entries import IndexItems, source_from_dict, source_to_dict
from clasp.search.flat_store import FlatStore
from clasp.search.indexer import Indexer, IndexReport
from clasp.search.metadata_filter import all_of, parse_filter
from clasp.search.query import SearchQuery, WeightedImage, WeightedText
from clasp.types import Caption, Encoder, Hit, ImageInput, Pair, ProgressCallback, UserError, no_progress
from toydata import COLOURS, WRITERS, draw, toys, write_csv, write_tar
from toysearch import Colours, model, png


def seen(engine: SearchEngine) -> int:
    assert isinstance(engine.model.encoder, Colours)
    return engine.model.encoder.seen


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """red.png, deep/green.png, deep/blue.png."""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("red", "deep/green", "deep/blue"):
        (tmp_path / "photos" / f"{name}.png").write_bytes(png(COLOURS[Path(name).name]))
    return tmp_path / "photos"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[SearchEngine]:
    store = FlatStore(tmp_path / "store")
    yield SearchEngine(model(), store)
    store.close()


def index(engine: SearchEngine, items: IndexItems, progress: ProgressCallback = no_progress) -> IndexReport:
    return Indexer(engine, batch=2).index(items, progress)


def search(engine: SearchEngine, text: Any = None, image: Any = None, k: int = 10, where: Any = None) -> list[Hit]:
    """By words, by an image, or by both."""
    texts = () if text is None else (WeightedText(text),)
    images = () if image is None else (WeightedImage(image),)
    return engine.search(SearchQuery(texts, images), k, where)


def ids(hits: list[Hit]) -> list[str]:
    return [hit.id for hit in hits]


def all_ids(engine: SearchEngine) -> set[str]:
    return {name for name, _ in engine.store.scan()}


def counts(indexed: IndexReport) -> tuple[int, int, int, int]:
    return indexed.added, indexed.unchanged, len(indexed.skipped), indexed.encoded


def touch(path: Path) -> None:
    """Another time, the same bytes."""
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))


# --- asking ----------------------------------------------------------------------------------------------------------


def test_by_words_by_an_image_and_by_both(engine: SearchEngine, photos: Path):
    assert isinstance(engine.model.encoder, Encoder)
    assert isinstance(engine.store, UpdatableStore)
    assert counts(index(engine, list_images(photos))) == (3, 0, 0, 3)
    assert ids(search(engine, "a red", k=1)) == ["red.png"]
    assert ids(search(engine, "blue")) == ["deep/blue.png", "deep/green.png", "red.png"]
    green = photos / "deep" / "green.png"
    for image in (green, str(green), green.read_bytes(), Image.open(io.BytesIO(green.read_bytes()))):
        hits = search(engine, image=image, k=1)
        assert ids(hits) == ["deep/green.png"]
        assert hits[0].score == pytest.approx(1)
    # between words and image: the cosine with the mean direction, computed by hand
    red, blue = (F.normalize(torch.tensor(COLOURS[name]) / 255 - 0.5, dim=0) for name in ("red", "blue"))
    hits = search(engine, "red", photos / "deep" / "blue.png")
    expected = float(F.normalize((red + blue) / 2, dim=0) @ red)
    assert {hit.id: hit.score for hit in hits}["red.png"] == pytest.approx(expected, abs=1e-5)
    assert {hit.id: hit.score for hit in hits}["deep/blue.png"] == pytest.approx(expected, abs=1e-5)


def test_where_chooses_by_metadata(engine: SearchEngine, tmp_path: Path):
    pairs = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        (tmp_path / f"{name}.png").write_bytes(png(colour))
        language = "sw" if number % 2 else "en"
        meta = {"taken": date(2020, 1, 1 + number), "n": number}
        captions = (Caption(f"a {name}", language), Caption(name))
        pairs.append(Pair(name, FileSource(str(tmp_path / f"{name}.png")), captions, "all", meta))
    index(engine, pairs)
    (hit,) = search(engine, "green", where=lambda meta: meta["meta"]["n"] == 1)
    path = str(tmp_path / "green.png")
    about = dict(hit.meta)
    assert len(about.pop("sha256")) == 64
    assert about == {
        "name": path,
        "source": {"kind": "file", "path": path},
        "version": FileSource(path).version,
        "origins": [],
        "captions": [{"text": "a green", "language": "sw"}, {"text": "green", "language": ""}],
        "languages": ["sw"],
        "group": "all",
        "meta": {"taken": "2020-01-02", "n": 1},
        "file": {"width": 4, "height": 4, "bytes": os.path.getsize(path)},
    }
    assert len(search(engine, "red", where=lambda meta: "sw" in meta["languages"])) == 3
    assert counts(index(engine, pairs)) == (0, 6, 0, 0)


def test_fields_of_the_file(engine: SearchEngine, photos: Path):
    exif = Image.Exif()
    exif[0x0110] = "X100"
    exif.get_ifd(0x8769)[0x9003] = "2021:07:31 20:15:00"
    Image.new("RGB", (6, 4), COLOURS["purple"]).save(photos / "purple.jpg", exif=exif)
    index(engine, list_images(photos))
    where = all_of([parse_filter("date>=2021-07-01"), parse_filter("camera~x1"), parse_filter("width=6")])
    (hit,) = search(engine, "red", where=where)
    size = os.path.getsize(photos / "purple.jpg")
    assert hit.id == "purple.jpg"
    assert hit.meta["file"] == {"date": "2021-07-31", "camera": "X100", "width": 6, "height": 4, "bytes": size}
    assert len(search(engine, "red", where=all_of([parse_filter(f"bytes={size}")]))) == 1
    # an index of a version without them: the files are read once more, none is encoded
    stored = {name: {key: value for key, value in meta.items() if key != "file"} for name, meta in engine.store.scan()}
    engine.store.add(list(stored), engine.store.vectors(list(stored)), list(stored.values()))
    assert search(engine, "red", where=where) == []
    before = seen(engine)
    assert counts(index(engine, list_images(photos))) == (0, 4, 0, 0)
    assert ids(search(engine, "red", where=where)) == ["purple.jpg"] and seen(engine) == before
    # new captions of an unchanged file: its fields are kept without reading it
    pairs = [Pair(name, FileSource(str(photos / name)), (Caption("x"),), name) for name in stored]
    index(engine, pairs)
    assert ids(search(engine, "red", where=where)) == ["purple.jpg"]


def test_what_cannot_be_asked(engine: SearchEngine, photos: Path):
    with pytest.raises(UserError, match="clasp index RUN FOLDER"):
        search(engine, "red")
    index(engine, list_images(photos))
    with pytest.raises(UserError, match="given neither"):
        search(engine)
    with pytest.raises(UserError, match="words '  '"):
        search(engine, "  ")
    for k in (0, -1):
        with pytest.raises(UserError, match=f"k = {k}: "):
            search(engine, "red", k=k)
    with pytest.raises(UserError, match="no such file"):
        search(engine, image=photos / "gone.png")
    (photos / "no.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"no\.png: not an image"):
        search(engine, image=str(photos / "no.png"))
    assert len(search(engine, "red", k=1000)) == 3


# --- encoding once ---------------------------------------------------------------------------------------------------


def test_a_second_index_encodes_nothing_and_says_so(
    engine: SearchEngine, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    first = index(engine, list_images(photos))
    assert str(first).startswith("3 images added, 3 of them encoded; 0 unchanged; ")
    monkeypatch.setattr(FileSource, "read", lambda source: pytest.fail(f"{source.name} was read"))
    again = index(engine, list_images(photos))
    assert counts(again) == (0, 3, 0, 0)
    assert str(again).startswith("nothing to encode: 3 images unchanged; ")
    assert seen(engine) == 3


def test_only_what_changed_is_encoded(engine: SearchEngine, photos: Path):
    index(engine, list_images(photos))
    (photos / "red.png").write_bytes(png(COLOURS["yellow"]))
    touch(photos / "red.png")
    touch(photos / "deep" / "green.png")  # the time alone
    (photos / "black.png").write_bytes(png(COLOURS["black"]))
    assert counts(index(engine, list_images(photos))) == (2, 2, 0, 2)
    assert ids(search(engine, "yellow", k=1)) == ["red.png"]
    assert ids(search(engine, "black", k=1)) == ["black.png"]
    assert engine.store.count() == 4
    assert counts(index(engine, list_images(photos))) == (0, 4, 0, 0)


def test_the_same_bytes_are_encoded_once_under_all_names(engine: SearchEngine, photos: Path):
    for number in range(5):  # more than a batch
        (photos / f"twin-{number}.png").write_bytes(png(COLOURS["red"]))
    assert counts(index(engine, list_images(photos))) == (8, 0, 0, 3)
    assert ids(search(engine, "red", k=6)) == ["red.png", *(f"twin-{number}.png" for number in range(5))]
    os.rename(photos / "red.png", photos / "crimson.png")
    assert counts(index(engine, list_images(photos))) == (0, 7, 0, 0)


def test_a_folder_that_moved_is_found_at_its_new_place(engine: SearchEngine, photos: Path):
    index(engine, list_images(photos))
    moved = photos.rename(photos.with_name("moved"))
    assert counts(index(engine, list_images(moved))) == (0, 3, 0, 0)
    (hit,) = search(engine, "red", k=1)
    assert (hit.id, hit.meta["name"]) == ("red.png", str(moved / "red.png"))
    assert engine.read_image(hit) == (moved / "red.png").read_bytes()


def test_two_folders_with_the_same_names_are_both_kept(engine: SearchEngine, photos: Path):
    index(engine, list_images(photos))
    scans = photos.with_name("scans")
    scans.mkdir()
    (scans / "red.png").write_bytes(png(COLOURS["purple"]))
    for expected in ((1, 0, 0, 1), (0, 1, 0, 0)):
        assert counts(index(engine, list_images(scans))) == expected
        assert counts(index(engine, list_images(photos))) == (0, 3, 0, 0)
        assert all_ids(engine) == {"red.png", "deep/green.png", "deep/blue.png", str(scans / "red.png")}
        assert ids(search(engine, "purple", k=1)) == [str(scans / "red.png")]


def test_an_image_is_in_the_store_once_whichever_folder_was_named(engine: SearchEngine, photos: Path):
    index(engine, list_images(photos / "deep"))
    assert counts(index(engine, list_images(photos))) == (3, 0, 0, 1)
    assert all_ids(engine) == {"red.png", "deep/green.png", "deep/blue.png"}


def test_ids_that_change_places_keep_their_vectors_apart(engine: SearchEngine, photos: Path):
    # each id takes the image of another: what is to be shared may be overwritten before it is
    paths = sorted(photos.rglob("*.png"))
    for path, name in zip(paths, ("black", "green", "red"), strict=True):
        path.write_bytes(png(COLOURS[name]))
        touch(path)
    index(engine, list_images(photos))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
        touch(path)
    indexed = index(engine, list_images(photos))
    assert (indexed.added, indexed.unchanged, engine.store.count()) == (3, 0, 3)
    for path, name in zip(paths, ("green", "red", "black"), strict=True):
        assert ids(search(engine, name, k=1)) == [path.relative_to(photos).as_posix()]


def test_new_captions_of_old_images_are_taken_over_without_encoding(engine: SearchEngine, photos: Path):
    source = FileSource(str(photos / "red.png"))
    index(engine, [Pair("r", source, (Caption("a red"),), "g")])
    assert counts(index(engine, [Pair("r", source, (Caption("rouge", "fr"),), "g")])) == (0, 1, 0, 0)
    (hit,) = search(engine, "red")
    assert hit.meta["captions"] == [{"text": "rouge", "language": "fr"}]


def test_pairs_of_one_image_are_one_entry(engine: SearchEngine, tmp_path: Path):
    drawings = toys(4)
    write_csv(drawings, tmp_path)
    rows = [f"images/{toy.key}.png,words {number} of {toy.colour}" for toy in drawings for number in range(3)]
    (tmp_path / "pairs.csv").write_text("filepath,title\n" + "\n".join(rows))
    assert counts(index(engine, open_pairs(tmp_path / "pairs.csv"))) == (4, 0, 0, 4)
    (tmp_path / "pairs.csv").write_text("filepath,title\n" + "\n".join(reversed(rows)))
    assert counts(index(engine, open_pairs(tmp_path / "pairs.csv"))) == (0, 4, 0, 0)
    for name, meta in engine.store.scan():
        assert name == f"images/{Path(meta['name']).name}#1"
        assert {caption["text"].split(" of")[0] for caption in meta["captions"]} == {"words 0", "words 1", "words 2"}


@pytest.mark.parametrize("form", WRITERS)
def test_pairs_of_every_form_can_be_found_and_read_again(tmp_path: Path, form: str):
    drawings = toys(12)
    pairs = open_pairs(WRITERS[form](drawings, tmp_path / "pairs"))
    store = FlatStore(tmp_path / "store")
    assert counts(Indexer(SearchEngine(model(), store), batch=5).index(pairs)) == (12, 0, 0, 12)
    store.close()
    engine = SearchEngine(model(), FlatStore(tmp_path / "store"))
    bytes_of = {pair.id: pair.image.read() for pair in pairs}
    for toy in drawings:
        hits = search(engine, toy.caption, k=12)
        assert all(engine.read_image(hit) == bytes_of[hit.id] for hit in hits)
        assert hits[0].meta["captions"][0]["text"].startswith(f"a {toy.colour}")
    assert counts(index(engine, pairs)) == (0, 12, 0, 0)
    assert seen(engine) == 0


# --- an index follows its sources ------------------------------------------------------------------------------------


def test_what_a_folder_no_longer_has_is_dropped_and_told(engine: SearchEngine, photos: Path):
    index(engine, list_images(photos))
    (photos / "red.png").unlink()
    done = index(engine, list_images(photos))
    assert (counts(done), done.removed, done.renamed) == ((0, 2, 0, 0), 1, 0)
    assert "nothing to encode: 2 images unchanged; 1 removed, which the source no longer has" in str(done)
    assert all_ids(engine) == {"deep/green.png", "deep/blue.png"}
    (photos / "deep" / "blue.png").rename(photos / "azure.png")
    done = index(engine, list_images(photos))
    assert (done.removed, done.renamed, done.encoded) == (0, 1, 0) and "; 1 renamed" in str(done)
    assert all_ids(engine) == {"deep/green.png", "azure.png"}
    assert ids(search(engine, "blue", k=1)) == ["azure.png"]
    assert index(engine, list_images(photos)).removed == 0


def test_what_is_renamed_is_not_added(engine: SearchEngine, photos: Path):
    shutil.copy(photos / "red.png", photos / "copy.png")
    assert counts(index(engine, list_images(photos))) == (4, 0, 0, 3)
    (photos / "deep").rename(photos / "deeper")
    done = index(engine, list_images(photos))
    assert (counts(done), done.removed, done.renamed) == ((0, 2, 0, 0), 0, 2)
    assert str(done).startswith("nothing to encode: 2 images unchanged; 2 renamed; ")
    (photos / "copy.png").unlink()  # its bytes are still there, under an id that is not new
    done = index(engine, list_images(photos))
    assert (counts(done), done.removed, done.renamed) == ((0, 3, 0, 0), 1, 0)
    (photos / "red.png").rename(photos / "crimson.png")
    shutil.copy(photos / "crimson.png", photos / "copy.png")
    done = index(engine, list_images(photos))
    assert (counts(done), done.removed, done.renamed) == ((1, 2, 0, 0), 0, 1)


@pytest.mark.parametrize("form", WRITERS)
def test_what_pairs_no_longer_have_is_dropped(engine: SearchEngine, tmp_path: Path, form: str):
    drawings = toys(6)
    index(engine, open_pairs(WRITERS[form](drawings, tmp_path / "pairs")))
    other = open_pairs(write_csv(drawings[:2], tmp_path / "other"))
    index(engine, other)
    everything = engine.store.count()
    shutil.rmtree(tmp_path / "pairs")
    fewer = open_pairs(WRITERS[form](drawings[1:4], tmp_path / "pairs"))
    done = index(engine, fewer)
    assert done.removed + done.renamed == everything - engine.store.count() >= 3
    names = {meta["name"] for _, meta in engine.store.scan()}
    assert names == {pair.image.name for pairs in (fewer, other) for pair in pairs}
    again = index(engine, fewer)
    assert (again.added, again.removed, again.renamed) == (0, 0, 0)


def test_only_the_source_that_is_indexed_loses_entries(engine: SearchEngine, photos: Path):
    scans = photos.with_name("scans")
    scans.mkdir()
    for name in ("black", "yellow"):
        (scans / f"{name}.png").write_bytes(png(COLOURS[name]))
    index(engine, list_images(photos))
    assert index(engine, list_images(scans)).removed == 0
    (photos / "red.png").unlink()
    (scans / "black.png").unlink()
    assert index(engine, list_images(scans)).removed == 1
    assert all_ids(engine) == {"red.png", "deep/green.png", "deep/blue.png", "yellow.png"}
    assert index(engine, list_images(photos)).removed == 1
    assert all_ids(engine) == {"deep/green.png", "deep/blue.png", "yellow.png"}


def test_an_image_of_two_sources_goes_with_the_last_of_them_or_with_its_file(engine: SearchEngine, photos: Path):
    table = photos / "pairs.csv"
    table.write_text("filepath,title\nred.png,a red\ndeep/green.png,a green\n")
    index(engine, list_images(photos))
    index(engine, open_pairs(table))
    table.write_text("filepath,title\ndeep/green.png,a green\n")
    assert index(engine, open_pairs(table)).removed == 0  # the folder has it still
    assert "red.png" in all_ids(engine)
    red = next(meta for name, meta in engine.store.scan() if name == "red.png")
    assert red["origins"] == [os.path.realpath(photos)]
    (photos / "deep" / "green.png").unlink()  # gone for both, whatever the table tells
    assert index(engine, list_images(photos)).removed == 1
    assert all_ids(engine) == {"red.png", "deep/blue.png"}


def test_a_table_joined_with_another_is_still_the_same_table(engine: SearchEngine, tmp_path: Path):
    one, two = write_csv(toys(4), tmp_path / "one"), write_csv(toys(3, seed=1), tmp_path / "two")
    index(engine, open_pairs(f"{one}::{two}"))
    one.write_text("".join(one.read_text().splitlines(keepends=True)[:3]))
    done = index(engine, open_pairs(one))
    assert (done.unchanged, done.removed, engine.store.count()) == (2, 2, 5)


def test_a_choice_of_pairs_drops_nothing(engine: SearchEngine, tmp_path: Path):
    pairs = open_pairs(write_csv(toys(6), tmp_path))
    index(engine, pairs)
    assert index(engine, pairs[:2]).removed == index(engine, pairs.subset([4])).removed == 0
    assert index(engine, list(pairs[:1])).removed == 0 and engine.store.count() == 6


def test_two_tables_with_the_same_ids_are_both_kept(engine: SearchEngine, tmp_path: Path):
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(COLOURS[colour]))
        (tmp_path / name / "pairs.csv").write_text(f"filepath,title,id\na.png,a {colour},7\n")
        index(engine, open_pairs(tmp_path / name / "pairs.csv"))
    assert all_ids(engine) == {"7", str(tmp_path / "two" / "a.png")}
    assert ids(search(engine, "red", k=1)) == ["7"]


def test_entries_of_an_index_without_origins_follow_their_folder(engine: SearchEngine, photos: Path):
    index(engine, list(list_images(photos)))  # a plain list: as an older clasp indexed
    assert all(not meta["origins"] for _, meta in engine.store.scan())
    (photos / "red.png").unlink()
    done = index(engine, list_images(photos))
    assert (counts(done), done.removed) == ((0, 2, 0, 0), 1)
    assert all_ids(engine) == {"deep/green.png", "deep/blue.png"}


def test_a_folder_named_by_a_link_is_the_same_folder(engine: SearchEngine, photos: Path):
    index(engine, list_images(photos))
    link = photos.with_name("link")
    link.symlink_to(photos)
    assert counts(index(engine, list_images(link))) == (0, 3, 0, 0)
    assert all_ids(engine) == {"red.png", "deep/green.png", "deep/blue.png"}


def test_an_image_out_of_reach_is_not_taken_for_removed(
    engine: SearchEngine, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    index(engine, list_images(photos))
    touch(photos / "red.png")

    def denied(source: FileSource) -> bytes:
        raise UserError(f"{source.path} cannot be read: Permission denied")

    monkeypatch.setattr(FileSource, "read", denied)
    done = index(engine, list_images(photos))
    assert (len(done.skipped), done.removed, engine.store.count()) == (1, 0, 3)


def test_progress_counts_every_image(engine: SearchEngine, photos: Path):
    told: list[tuple[int, int]] = []
    index(engine, list_images(photos), lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (2, 3), (3, 3)]
    told.clear()
    index(engine, list_images(photos), lambda done, total: told.append((done, total)))
    assert told == [(3, 3)]


def test_what_was_kept_before_an_interruption_is_not_encoded_again(engine: SearchEngine, photos: Path):
    def interrupted(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(engine, list_images(photos), interrupted)
    assert counts(index(engine, list_images(photos))) == (1, 2, 0, 1)


def test_a_batch_is_read_while_the_one_before_it_is_encoded(engine: SearchEngine, photos: Path):
    reads: list[str] = []
    third_is_read = threading.Event()

    class Told(FileSource):
        def read(self) -> bytes:
            reads.append(self.path)
            if len(reads) == 3:
                third_is_read.set()
            return FileSource.read(self)

    def patient(inputs: ImageInput) -> Any:
        assert third_is_read.wait(10), "the first batch was encoded before the second was read"
        return Colours().embed_image(inputs)

    engine.model.encoder.embed_image = patient
    items = [(name, Told(source.name)) for name, source in list_images(photos)]
    assert counts(index(engine, items)) == (3, 0, 0, 3)  # a batch is two


def test_one_thread_and_many_store_the_same(tmp_path: Path):
    for number in range(40):
        (tmp_path / f"{number:02}.png").write_bytes(png((6 * number, number % 7 * 30, 200 - 5 * number)))
    stored = []
    for threads in (1, 4):
        store = FlatStore(tmp_path.with_name(f"{tmp_path.name}-{threads}"))
        Indexer(SearchEngine(model(), store), batch=7, threads=threads).index(list_images(tmp_path))
        names = [name for name, _ in store.scan()]
        stored.append((names, store.vectors(names).tolist()))
        store.close()
    assert stored[0] == stored[1]
    assert stored[0][0] == [f"{number:02}.png" for number in range(40)]


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_a_corrupt_image_is_skipped_and_named(engine: SearchEngine, photos: Path, caplog: pytest.LogCaptureFixture):
    (photos / "bad.png").write_bytes(b"not an image")
    (photos / "cut.png").write_bytes(png((1, 2, 3), 64)[:-40])
    with caplog.at_level(logging.WARNING):
        indexed = index(engine, list_images(photos))
    assert counts(indexed) == (3, 0, 2, 3)
    assert [name for name, _ in indexed.skipped] == ["bad.png", "cut.png"]
    assert "2 skipped: bad.png (not an image" in str(indexed)
    assert "skipped bad.png: not an image" in caplog.text
    again = index(engine, list_images(photos))
    assert counts(again) == (0, 3, 2, 0)
    assert "2 skipped: bad.png" in str(again)


def test_an_image_that_became_something_else_is_no_longer_found(engine: SearchEngine, photos: Path):
    index(engine, list_images(photos))
    (photos / "red.png").write_bytes(b"overwritten")
    assert counts(index(engine, list_images(photos))) == (0, 2, 1, 0)
    assert all_ids(engine) == {"deep/green.png", "deep/blue.png"}


def test_a_copy_of_an_image_that_became_something_else_is_encoded(engine: SearchEngine, photos: Path):
    index(engine, list_images(photos))
    (photos / "copy.png").write_bytes((photos / "red.png").read_bytes())
    (photos / "red.png").write_bytes(b"overwritten")
    (photos / "more.png").write_bytes(png(COLOURS["black"]))
    items = sorted(list_images(photos), key=lambda item: item[0], reverse=True)  # red and more, then the copy
    assert counts(index(engine, items)) == (2, 2, 1, 2)
    assert ids(search(engine, "red", k=1)) == ["copy.png"]


def test_an_image_out_of_reach_is_skipped_and_kept(engine: SearchEngine, photos: Path):
    # a disk that is not mounted today must not empty the store
    pairs = [Pair(name, source, (Caption("a"),), name) for name, source in list_images(photos)]
    index(engine, pairs)
    (photos / "red.png").unlink()
    indexed = index(engine, pairs)
    assert counts(indexed) == (0, 2, 1, 0)
    assert "cannot be read: No such file" in indexed.skipped[0].reason
    assert "red.png" in all_ids(engine)


def test_nothing_to_index(engine: SearchEngine, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no images: looked for \.jpg, .*; found nothing"):
        list_images(tmp_path / "empty")
    with pytest.raises(UserError, match="looked for pairs or images"):
        index(engine, [])
    for number in range(3):
        (tmp_path / "empty" / f"{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 3 images can be read; the first: 0\.png: not an image"):
        index(engine, list_images(tmp_path / "empty"))
    assert engine.store.count() == 0


def test_an_id_given_twice(engine: SearchEngine, photos: Path):
    pairs = [Pair("same", source, (), "g") for _, source in list_images(photos)]
    with pytest.raises(UserError, match=r"the id 'same' is given twice, to .*red\.png and to .*blue\.png"):
        index(engine, pairs)


def test_another_models_store_is_refused_or_made_anew(
    engine: SearchEngine, photos: Path, caplog: pytest.LogCaptureFixture
):
    index(engine, list_images(photos))
    engine.store.close()
    other = model("e" * 64)
    store = FlatStore(photos.with_name("store"))
    with pytest.raises(UserError, match=r"made with the model colours \(f{12}\), not colours \(e{12}\)") as caught:
        SearchEngine(other, store)
    assert "clasp index RUN FOLDER" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert counts(index(SearchEngine.for_indexing(other, store), list_images(photos))) == (3, 0, 0, 3)
    assert "3 embeddings were made with another model" in caplog.text
    assert counts(index(SearchEngine.for_indexing(other, store), list_images(photos))) == (0, 3, 0, 0)
    store.close()
    assert FlatStore(photos.with_name("store")).model == other.fingerprint


def test_a_model_that_gives_no_direction_is_told(tmp_path: Path, engine: SearchEngine):
    (tmp_path / "grey").mkdir()
    (tmp_path / "grey" / "white.png").write_bytes(png((255, 255, 255)))
    engine.model.encoder.embed_image = lambda inputs: torch.full((len(inputs.values), 3), float("nan"))
    with pytest.raises(UserError, match=r"'white\.png' is zero or not finite"):
        index(engine, list_images(tmp_path / "grey"))


# --- hits into a picture ---------------------------------------------------------------------------------------------


def test_a_sheet_shows_hits_and_leaves_a_place_for_what_has_gone(engine: SearchEngine, photos: Path):
    index(engine, list_images(photos))
    hits = search(engine, "red")
    (photos / "deep" / "blue.png").unlink()
    (row,) = contact_sheet_rows([("red", hits)], is_correct=lambda title, hit: title in hit.id)
    assert row.title == "red"
    assert row.note == f"cosine {hits[0].score:.2f} to {hits[-1].score:.2f}"
    images = {label: (image, good) for image, label, good in row.tiles}
    assert images["red.png"] == ((photos / "red.png").read_bytes(), True)
    assert images["deep/blue.png"] == (None, False)
    sheet = contact_sheet([row, *contact_sheet_rows([("nothing", [])])], photos / "sheet.png")
    assert sheet.path.stat().st_size > 0
    (captioned,) = contact_sheet_rows([("red", hits)], label=lambda hit: f"{hit.score:.1f}")
    assert captioned.tiles[0][1] == "1.0"


def test_an_image_that_changed_is_not_shown_as_the_one_that_was_found(engine: SearchEngine, photos: Path):
    tar = write_tar(toys(3), photos.with_name("a.tar"))
    index(engine, open_pairs(tar))
    index(engine, list_images(photos))
    hits = {hit.id: hit for hit in search(engine, "red")}
    (photos / "red.png").write_bytes(png(COLOURS["blue"]))
    tar.write_bytes(write_tar(toys(5, seed=1), photos.with_name("b.tar")).read_bytes())
    for name in ("red.png", f"{toys(3)[0].key}"):
        with pytest.raises(UserError, match=r"has changed since it was indexed|was changed after it was opened"):
            engine.read_image(hits[name])
        assert contact_sheet_rows([("red", [hits[name]])])[0].tiles[0][0] is None


ARRAY = np.zeros((4, 4, 3), np.uint8)
PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    "alone, wanted",
    [
        ("a.png", "'a.png' alone"),
        (b"a", "1 bytes alone"),
        (Path("a.png"), "a.png"),
        (PICTURE, "PIL.Image.Image"),
        (None, "None"),
        (5, "a value of type int: 5"),
        ({"a.png": 1}, "of type dict"),
        ({"a.png"}, "of type set"),
        (ARRAY, r"an array \(numpy.ndarray of shape \(4, 4, 3\), uint8\)"),
        (torch.zeros(2, 3, 4, 4), r"an array \(torch.Tensor of shape \(2, 3, 4, 4\), torch.float32\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_image_is_no_list_of_images(alone: Any, wanted: str):
    for encode, what in ((model().encode_image, "images"), (model().encode_text, "strings")):
        with pytest.raises(UserError, match=f"takes a list of {what}, not .*{wanted}") as error:
            encode(alone)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [None, 5, 1.5, True, ["red"], (b"a",), {"a": 1}, ARRAY, torch.zeros(3)],
    ids=lambda value: type(value).__name__,
)
def test_a_wrong_argument_among_good_ones_is_named(wrong: Any):
    with pytest.raises(UserError, match=r"encode_text: text 1 is .*; it takes strings") as error:
        model().encode_text(["red", wrong])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"encode_image: image 1 is .*; it takes a path, encoded bytes or a PIL image"):
        model().encode_image([PICTURE, wrong])


UNREADABLE = {
    "none.jpg": "none.jpg: no such file",
    "": "an empty path: no such file",
    "folder": "folder: cannot be read: Is a directory",
    "a\0b": r"a\x00b: cannot be read: embedded null byte",
    "loop.png": "loop.png: cannot be read: Too many levels of symbolic links",
    "pipe.jpg": "pipe.jpg is a pipe, not a regular file",
    "text.jpg": "text.jpg: not an image, or of a format that Pillow cannot read",
    "cut.png": "cut.png: damaged image: image file is truncated",
}


def test_an_image_that_cannot_be_read_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("loop.png").symlink_to("loop.png")
    os.mkfifo("pipe.jpg")
    Path("text.jpg").write_text("no image")
    Path("cut.png").write_bytes(png((255, 0, 0))[:50])
    for path, line in UNREADABLE.items():
        with pytest.raises(UserError) as error:
            model().encode_image([PICTURE, path])
        assert str(error.value) == line
    with pytest.raises(UserError, match=r"^image 1: not an image, or of a format that Pillow cannot read$"):
        model().encode_image([PICTURE, b"no image"])


def test_text_that_is_not_unicode_is_named():
    with pytest.raises(UserError, match=r"encode_text: text 1: .*'half \\ud83d'.* lone surrogate") as error:
        model().encode_text(["red", "half \ud83d"])
    str(error.value).encode()
    with pytest.raises(UserError, match="encode_text: text 0 is 1 bytes"):
        model().encode_text([b"a"])


def test_equal_texts_are_encoded_once():
    encoder, counts = model(), []
    found = encoder.encode_text(["red", "green", "red"], progress=lambda done, total: counts.append((done, total)))
    assert torch.equal(found, encoder.encode_text(["red", "green"])[[0, 1, 0]]) and counts[-1] == (2, 2)


def test_lists_of_every_kind_and_of_nothing():
    encoder = model()
    red = encoder.encode_text(["red"])
    for texts in (("red",), np.array(["red"]), np.array(["red"], object), (text for text in ["red"])):
        assert torch.equal(encoder.encode_text(texts), red)
    assert encoder.encode_text([]).shape == encoder.encode_image([]).shape == (0, 3)
    assert encoder.similarity(encoder.encode_image([]), red).shape == (0, 1)
    assert encoder.similarity(encoder.encode_image([PICTURE]), encoder.encode_text([])).shape == (1, 0)


def test_similarity_takes_embeddings_only():
    red = model().encode_text(["red"])
    for wrong in (None, [0.5], np.zeros((1, 3)), red[0]):
        with pytest.raises(UserError, match=r"similarity: texts is .*; it takes embeddings"):
            model().similarity(red, wrong)
    with pytest.raises(UserError, match="images are 3 wide and texts 2"):
        model().similarity(red, red[:, :2])


@pytest.mark.parametrize(
    "asked, wanted",
    [
        ({"text": 5}, "words as one string, not 5"),
        ({"text": ["red"]}, "words as one string"),
        ({"text": "\u200b"}, "which are blank"),
        ({"text": "\ud83d"}, "lone surrogate"),
        ({"image": ARRAY}, "an array"),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_search_are_named(asked: Any, wanted: str, engine: SearchEngine, photos: Path):
    index(engine, list_images(photos))
    with pytest.raises(UserError, match=wanted):
        search(engine, **asked)


def test_sources_as_plain_data(tmp_path: Path):
    for form in ("folder", "tar", "parquet bytes"):
        for pair in open_pairs(WRITERS[form](toys(3), tmp_path / form)):
            said = source_to_dict(pair.image)
            assert said is not None
            assert source_from_dict(said) == pair.image
    for source in (ZipSource("/a.zip", "5-7", "0/1.png"), ArrowSource("/a.arrow", "5-7", "image", 3)):
        said = source_to_dict(source)
        assert said is not None and source_from_dict(json.loads(json.dumps(said))) == source

    class Elsewhere:
        name, version = "there", "1"

        def read(self) -> bytes:
            return draw("circle", "red").tobytes()

    assert source_to_dict(Elsewhere()) is None
    with pytest.raises(UserError, match="there cannot be read again"):
        SearchEngine.read_image(Hit("x", 1.0, {"name": "there", "source": None}))


def test_stored_metadata_that_lacks_a_field_is_named(engine: SearchEngine, photos: Path):
    engine.store.add(["x"], np.ones((1, 3), np.float32), [{"name": "x"}])  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="the stored metadata of 'x' is damaged"):
        index(engine, list_images(photos))
