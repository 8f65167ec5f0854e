"""Pairs through their front door: the same toy pairs in every form, ids, groups, splits, and every wrong input."""

import itertools
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from torch.utils.data import DataLoader

from bad_inputs import refused
from clasp.data.formats import parquet, sources
from clasp.data.pairs import FileSource, Pairs, expand_source, open_pairs, split_by_group
from clasp.types import Caption, Pair, UserError
from toydata import WRITERS, Toy, toys, write_csv, write_folder, write_jsonl, write_shards, write_tar

TOYS = toys(13, seed=3)


def content(pairs: Iterable[Pair]) -> list[tuple[bytes, tuple[str, ...]]]:
    return sorted((pair.image.read(), tuple(caption.text for caption in pair.captions)) for pair in pairs)


# --- every form ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_pairs(form: str, tmp_path: Path):
    source = WRITERS[form](TOYS, tmp_path / "data")
    pairs = open_pairs(source)
    assert content(pairs) == sorted((toy.png, (toy.caption,)) for toy in TOYS)
    assert pairs.name == str(source)
    assert len({pair.id for pair in pairs}) == len(pairs) == 13
    assert [pair.id for pair in pairs[::-1]] == [pair.id for pair in pairs][::-1]
    assert pairs[-1] == pairs[12]
    with pytest.raises(IndexError):
        pairs[13]


@pytest.mark.parametrize("form", WRITERS)
def test_sources_that_share_a_cache_are_each_read_as_they_are_now(form: str, tmp_path: Path):
    """Two sources of a format, one of them changed after it was opened, and again after that: one cache folder."""
    cache = tmp_path / "cache"
    for name, some in (("a", TOYS[:6]), ("b", TOYS[3:13]), ("a", TOYS[:9]), ("b", TOYS[3:13]), ("a", TOYS[8:])):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        source = WRITERS[form](some, tmp_path / name)
        for _ in range(2):  # built, then remembered
            assert content(open_pairs(source, cache=cache)) == sorted((toy.png, (toy.caption,)) for toy in some)


def test_captions_changed_in_place_are_checked_anew(tmp_path: Path):
    folder, cache = write_folder(TOYS, tmp_path / "data"), tmp_path / "cache"
    assert len(open_pairs(folder, cache=cache)) == len(TOYS)
    text = folder / f"{TOYS[4].key}.txt"
    text.write_text("   ")
    with pytest.raises(UserError, match="1 of 13 pairs have an empty caption"):
        open_pairs(folder, cache=cache)
    text.unlink()
    text.with_suffix(".json").write_text('{"caption": "from beside"}')
    assert "from beside" in {pair.captions[0].text for pair in open_pairs(folder, cache=cache)}


def test_an_index_error_inside_a_part_does_not_end_the_pairs():
    class Damaged(list[Pair]):
        def __getitem__(self, row):  # pyright: ignore[reportIncompatibleMethodOverride]
            raise IndexError("an index that does not fit its file")

    with pytest.raises(IndexError, match="does not fit"):
        list(Pairs("damaged", [Damaged([Pair("a", FileSource("a.png"), (Caption("a"),), "a")])]))


@pytest.mark.parametrize("form", WRITERS)
def test_ids_do_not_depend_on_where_the_data_lies_nor_versions_on_reading(form: str, tmp_path: Path):
    before = open_pairs(WRITERS[form](TOYS, tmp_path / "here"))
    ids, version = [pair.id for pair in before], before.version
    (tmp_path / "here").rename(tmp_path / "there")
    source = before.name.replace("here", "there")
    if form == "lilt":  # its paths are absolute
        there = Path(source)
        there.write_text(there.read_text().replace("/here/", "/there/"))
    after = open_pairs(source)
    assert [pair.id for pair in after] == ids
    if form != "lilt":
        assert after.version == version


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 on, in a process with threads
@pytest.mark.parametrize("form", WRITERS)
def test_forked_workers_read_the_same(form: str, tmp_path: Path):
    pairs = open_pairs(WRITERS[form](TOYS, tmp_path))
    here = content(pairs)
    pairs = pickle.loads(pickle.dumps(pairs))
    loader = DataLoader(pairs, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert content(list(loader)) == here


def test_spawned_workers_and_size_of_a_pickle(tmp_path: Path):
    pairs = open_pairs(write_shards(TOYS, tmp_path))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_first_bytes, (pairs,)) == pairs[0].image.read()
    table = open_pairs(write_jsonl(toys(2), tmp_path / "small")), open_pairs(_lines(tmp_path / "many.jsonl", 5_000))
    sizes = [len(pickle.dumps(pairs)) for pairs in table]
    assert sizes[1] - sizes[0] < 40 * 5_000  # offsets and hashes, nothing of what the rows say


def _first_bytes(pairs: Pairs) -> bytes:
    return pairs[0].image.read()


def _lines(file: Path, count: int) -> Path:
    rows = ({"image": f"{number:07}.png", "caption": f"thing number {number}"} for number in range(count))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- several sources -------------------------------------------------------------------------------------------------


def test_expand():
    assert expand_source("s-{008..011}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expand_source("{a,b}-{0..1}.csv::c.jsonl") == ["a-0.csv", "a-1.csv", "b-0.csv", "b-1.csv", "c.jsonl"]
    with pytest.raises(UserError, match="counts down"):
        expand_source("{3..1}.tar")


def test_braces_that_stand_for_too_many_sources_are_refused():
    with pytest.raises(UserError, match="more than 1,000,000 sources"):
        expand_source("{0..999999999999}.tar")


def test_joined_sources_keep_ids_that_differ_and_prefix_those_that_do_not(tmp_path: Path):
    one, two = write_tar(TOYS[:7], tmp_path / "one.tar"), write_csv(TOYS[7:], tmp_path)
    joined = open_pairs(f"{one}::{two}")
    assert [pair.id for pair in joined] == [t.key for t in TOYS[:7]] + [f"images/{t.key}.png" for t in TOYS[7:]]
    again = write_tar(TOYS[:7], tmp_path / "again.tar")
    both = open_pairs(f"{one}::{again}")
    assert [pair.id for pair in both] == [f"{tar}::{toy.key}" for tar in ("one.tar", "again.tar") for toy in TOYS[:7]]
    assert [pair.group for pair in both] == [pair.id for pair in both]
    refused(f"{one}::{one}", "given twice", repr(f"one.tar::{TOYS[0].key}"))


def test_one_image_in_two_tables_is_one_group_and_equal_names_in_two_folders_are_not(tmp_path: Path):
    write_csv(TOYS, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copy(tmp_path / "a" / "pairs.csv", tmp_path / "a" / "swahili.csv")
    table = f"{tmp_path}/a/pairs.csv"
    same = open_pairs(f"{table}::{tmp_path}/a/swahili.csv")
    assert len({pair.id for pair in same}) == 26 and len({pair.group for pair in same}) == 13
    assert same[0].id == f"pairs.csv::images/{TOYS[0].key}.png" and same[0].group == same[13].group
    other = open_pairs(f"{table}::{tmp_path}/b/pairs.csv")
    assert len({pair.group for pair in other}) == 26
    assert {pair.group.split("/")[0] for pair in other} == {"a", "b"}
    tar = open_pairs(f"{table}::{write_tar(TOYS, tmp_path / 'a' / 'one.tar')}")
    assert [pair.group for pair in tar] == [pair.id for pair in tar]


def test_an_explicit_id_may_not_be_in_two_sources(tmp_path: Path):
    for name in ("a", "b"):
        row = {"image": f"{name}.jpg", "caption": "x", "id": "seven"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    refused(f"{tmp_path}/a.jsonl::{tmp_path}/b.jsonl", "'seven'", "in a.jsonl and in b.jsonl")


# --- subset, version, split ------------------------------------------------------------------------------------------


def test_subsets_compose_and_take_numpy_numbers(tmp_path: Path):
    pairs = open_pairs(write_shards(TOYS, tmp_path))
    ids = [pair.id for pair in pairs]
    assert [pair.id for pair in pairs.subset(np.array([12, 0, 5])).subset([2, 0])] == [ids[5], ids[12]]
    assert pairs.subset([]).name == pairs.name and len(pairs.subset([])) == 0
    assert pairs[np.int64(4)].id == ids[4]
    with pytest.raises(IndexError):
        pairs.subset([13])


def test_a_list_of_pairs_is_a_part(tmp_path: Path):
    listed = [Pair(str(number), FileSource("x.png"), (Caption("a"),), "g") for number in range(3)]
    pairs = Pairs("by hand", [listed, open_pairs(write_csv(TOYS, tmp_path))])
    assert len(pairs) == 16 and pairs[2] is listed[2] and pairs[3].id == f"images/{TOYS[0].key}.png"


def test_version_follows_ids_order_and_image_files_but_reads_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_csv(TOYS, tmp_path)
    monkeypatch.setattr(FileSource, "read", lambda self: pytest.fail("an image was read"))
    version = open_pairs(source).version
    assert open_pairs(source).version == version and len(version) == 64
    assert open_pairs(source)[::-1].version != version
    image = tmp_path / "images" / f"{TOYS[0].key}.png"
    os.utime(image, ns=(0, 0))
    touched = open_pairs(source).version
    image.unlink()
    assert len({version, touched, open_pairs(source).version}) == 3


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_split_is_stable_and_by_group(fraction: float, tmp_path: Path):
    rows = [{"image": f"{n}.jpg", "caption": f"c{n}", "group": f"g{n // 3}"} for n in range(240)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    train, held = split_by_group(open_pairs(file), fraction)
    assert len(train) + len(held) == 240 and abs(len(held) / 240 - fraction) < 0.12
    assert not {pair.group for pair in train} & {pair.group for pair in held}
    held_ids = {pair.id for pair in held}
    assert held_ids != {pair.id for pair in split_by_group(open_pairs(file), fraction, salt="other")[1]}
    file.write_text("\n".join(map(json.dumps, rows[::-2])))  # fewer pairs, in another order
    assert {pair.id for pair in split_by_group(open_pairs(file), fraction)[1]} <= held_ids


@pytest.mark.parametrize("groups", range(2, 8))
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_no_side_of_a_split_is_empty(groups: int, fraction: float):
    source = FileSource("x.png")
    for salt in map(str, range(10)):
        pairs = Pairs("few", [[Pair(str(n), source, (), f"g{n % groups}") for n in range(2 * groups)]])
        assert all(len(side) >= 2 for side in split_by_group(pairs, fraction, salt=salt))


def test_what_cannot_be_split():
    pairs = Pairs("one group", [[Pair(str(n), FileSource("x.png"), (), "g") for n in range(5)]])
    with pytest.raises(UserError, match="one group: all 5 pairs are one group"):
        split_by_group(pairs, 0.5)
    for fraction in (0.0, 1.0, -0.1, 10.0):
        with pytest.raises(UserError, match="between 0 and 1"):
            split_by_group(pairs, fraction)


# --- wrong inputs ----------------------------------------------------------------------------------------------------


def test_sources_that_are_not_there_or_of_no_known_kind(tmp_path: Path):
    there = write_tar(TOYS, tmp_path / "there.tar")
    for nothing in ("", f"{there}::"):
        refused(nothing, repr(nothing), "names no source")
    (tmp_path / "pairs.jsonl").touch()
    refused(tmp_path / "pairs.json", "pairs.json does not exist", "did you mean pairs.jsonl?")
    refused(tmp_path / "no" / "pairs.json", "does not exist", f"neither does its folder {tmp_path / 'no'}")
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    refused(tmp_path / "link.jsonl", "link.jsonl is a link to gone.jsonl, which does not exist")
    write_shards(TOYS, tmp_path)
    refused(f"{tmp_path}/shard-{{000..005}}.tar", "shard-003.tar does not exist", "2 more of the 6")
    (tmp_path / "pairs.xlsx").touch()
    refused(tmp_path / "pairs.xlsx", "pairs.xlsx", "a folder, or .csv, .tsv, .jsonl, .json, .parquet, .tar")


def test_sources_without_pairs_say_what_was_looked_for_and_found(tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "has no pairs", "looked for images (.jpg", "found nothing")
    for name in ("a.pdf", "b.pdf", "c.csv"):
        (empty / name).touch()
    refused(empty, "found 2 .pdf, 1 .csv")
    refused(write_tar([], tmp_path / "empty.tar"), "has no pairs", "found nothing")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    refused(tmp_path / "empty.jsonl", "has no pairs", "one JSON object a line")
    (tmp_path / "empty.json").write_text(" [ ] ")
    refused(tmp_path / "empty.json", "has no pairs", "a list of objects")
    (tmp_path / "empty.csv").touch()
    refused(tmp_path / "empty.csv", "is empty", "line of column names")
    (tmp_path / "header.csv").write_text("filepath,title\n")
    refused(tmp_path / "header.csv", "has no pairs", "rows below")


@pytest.mark.parametrize("form", [form for form in WRITERS if form not in ("classes", "shards")])
def test_empty_captions_are_counted_and_the_first_is_named(form: str, tmp_path: Path):
    silent = [Silent(*toy) if number in (4, 9) else toy for number, toy in enumerate(TOYS)]
    source = WRITERS[form](silent, tmp_path)
    line = refused(source, "2 of 13 pairs have an empty caption", str(source))
    where = {"csv": "line 6", "tsv": "line 6", "jsonl": "line 5", "lilt": "entry 5"}.get(form, "row 4")
    keys = [TOYS[4].key, TOYS[9].key]
    assert line.endswith(where) or any(key in line for key in (keys if form == "folder" else keys[:1]))


class Silent(Toy):
    @property
    def caption(self) -> str:
        return " \t "


@pytest.mark.parametrize("form", ["csv", "folder", "shards", "parquet bytes"])
def test_what_vanishes_or_changes_after_opening_is_told_when_read(form: str, tmp_path: Path):
    pairs = open_pairs(WRITERS[form](TOYS, tmp_path / "data"))
    image = pairs[0].image
    if form in ("csv", "folder"):
        Path(image.name).unlink()
        with pytest.raises(UserError, match="cannot be read: No such file"):
            image.read()
        assert image.version == "missing"
        return
    file = Path(image.name.split("::")[0])
    file.write_bytes(file.read_bytes()[:300])  # in place: who has it open sees it
    with pytest.raises(UserError, match="is truncated" if form == "shards" else "cannot be read"):
        image.read()
    sources._open_descriptor.cache_clear()
    parquet._parquet.cache_clear()
    with pytest.raises(UserError, match="was changed after it was opened"):
        image.read()


def test_missing_images_are_no_reason_to_refuse_a_table(tmp_path: Path):
    source = write_csv(TOYS, tmp_path)
    shutil.rmtree(tmp_path / "images")
    assert len(open_pairs(source)) == 13


def test_image_root_and_absolute_paths(tmp_path: Path):
    source = write_csv(TOYS, tmp_path / "images")
    moved = shutil.move(source, tmp_path / "table.csv")
    pairs = open_pairs(moved, image_root=tmp_path / "images")
    assert pairs[0].image.read() == TOYS[0].png and pairs[0].id == f"images/{TOYS[0].key}.png"
    outside = tmp_path / "outside.csv"
    outside.write_text(f"filepath,title\n{tmp_path}/images/./images/{TOYS[0].key}.png,a\n/elsewhere/b.png,b\n")
    ids = [pair.id for pair in open_pairs(outside, image_root=tmp_path / "images")]
    assert ids == [f"images/{TOYS[0].key}.png", "/elsewhere/b.png"]


@pytest.mark.parametrize("image", ["../secret.png", "/etc/secret.png", "images/../../secret.png"])
def test_a_table_does_not_lead_out_of_its_folder_unless_its_root_is_named(image: str, tmp_path: Path):
    source = tmp_path / "data" / "table.jsonl"
    source.parent.mkdir()
    source.write_text(json.dumps({"image": image, "caption": "a secret"}) + "\n")
    with pytest.raises(UserError, match=r"line 1: the image path .* leads out of .*: image_root=FOLDER"):
        open_pairs(source)
    assert len(open_pairs(source, image_root=source.parent)) == 1
    pyarrow.parquet.write_table(pyarrow.table({"image": [image], "caption": ["x"]}), source.with_suffix(".parquet"))
    with pytest.raises(UserError, match="leads out of"):
        open_pairs(source.with_suffix(".parquet"))


def test_addresses_nul_and_lists_in_lists_are_told_plainly(tmp_path: Path):
    source = tmp_path / "table.jsonl"
    for row, words in (
        ({"image": "https://example.org/a.png", "caption": "a"}, "is an address, and nothing is downloaded"),
        ({"image": "file:///etc/a.png", "caption": "a"}, "is an address"),
        ({"image": "a.png", "caption": "a\0b"}, "character 2 is NUL"),
        ({"image": "a.png", "caption": [["a", "b"], "c"]}, "not a list in a list"),
    ):
        source.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=words) as told:
            open_pairs(source)
        assert "line 1" in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(UserError, match="is an address"):
        open_pairs("https://example.org/pairs.csv")


@pytest.mark.parametrize("harm", [b"", b"PK", "half", "zeros"])
def test_a_damaged_index_is_made_again_and_said(harm: bytes | str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = write_csv(TOYS, tmp_path)
    before = [pair.id for pair in open_pairs(source, cache=tmp_path / "cache")]
    (index,) = (tmp_path / "cache").glob("index-*.arrow")
    whole = index.read_bytes()
    middle = len(whole) // 3
    zeros = whole[:middle] + bytes(64) + whole[middle + 64 :]
    index.write_bytes(harm if isinstance(harm, bytes) else whole[: len(whole) // 2] if harm == "half" else zeros)
    assert [pair.id for pair in open_pairs(source, cache=tmp_path / "cache")] == before
    assert "damaged" in caplog.text and index.read_bytes() == whole and len(caplog.records) == 1


def test_an_unreadable_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_csv(TOYS, tmp_path)

    def denied(*args: object, **kwargs: object):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(source, "pairs.csv cannot be opened: Permission denied")


def test_order_is_that_of_the_shards(tmp_path: Path):
    pairs = open_pairs(write_shards(TOYS, tmp_path, shards=4))
    assert [pair.id for pair in pairs] == [toy.key for toy in TOYS]
    for order in itertools.islice(itertools.permutations(range(13)), 0, 3):
        assert [pair.image.read() for pair in pairs.subset(order)] == [TOYS[number].png for number in order]
