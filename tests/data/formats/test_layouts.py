"""Data sets in the layouts in which they are published: webdataset folders, Hugging Face, ELEVATER, XTD, XM3600."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clasp.data import pair_sequence
from clasp.data.formats.base import SourceSpec
from clasp.data.formats.image_cells import image_of_cell
from clasp.data.formats.listed_pairs import ListedPairs, check_listed_pairs
from clasp.data.pairs import PAIR_FORMATS, ColumnNames, FileSource, Pairs, open_pairs
from clasp.data.readers import PairIndex
from clasp.types import Caption, Pair, UserError
from toydata import COLOURS, Toy, add_member, toys

TOYS = toys(12)
CLASSES = sorted(COLOURS)
LABELS = [CLASSES.index(toy.colour) for toy in TOYS]


def write_shards(folder: Path, texts: Sequence[str] | None = None, per_shard: int = 5) -> Path:
    """As CLIP_benchmark exports: ``.cls`` of classes, or ``.txt`` with a caption on each line."""
    folder.mkdir(parents=True)
    starts = range(0, len(TOYS), per_shard)
    for shard, start in enumerate(starts):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(start, min(start + per_shard, len(TOYS))):
                add_member(tar, f"s{number:07}.png", TOYS[number].png)
                if texts is None:
                    add_member(tar, f"s{number:07}.cls", str(LABELS[number]).encode())
                else:
                    add_member(tar, f"s{number:07}.txt", texts[number].encode())
    (folder / "nshards.txt").write_text(f"{len(starts)}\n")
    return folder


def require_toys(pairs: Pairs, *, classes: bool = True) -> None:
    """The pairs are ``TOYS`` in order, each readable, with its class."""
    assert [pair.image.read() for pair in pairs] == [toy.png for toy in TOYS]
    if classes:
        assert [pair.meta["class"] for pair in pairs] == [toy.colour for toy in TOYS]
        assert [pair.captions[0].text for pair in pairs] == [toy.colour for toy in TOYS]


def test_a_folder_of_shards_is_read_in_the_order_of_their_numbers(tmp_path: Path):
    write_shards(tmp_path / "set" / "test", per_shard=1)  # 12 shards: 10.tar after 9.tar
    (tmp_path / "set" / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    for source in (tmp_path / "set", tmp_path / "set" / "test"):
        require_toys(open_pairs(source))
    (tmp_path / "set" / "test" / "7.tar").unlink()
    with pytest.raises(UserError, match=r"says '12' shards: 7.tar is missing"):
        open_pairs(tmp_path / "set")


def test_a_tar_beside_images_is_no_shard(tmp_path: Path):
    write_class_folders(tmp_path)
    write_shards(tmp_path / "other")
    (tmp_path / "other" / "0.tar").rename(tmp_path / "backup.tar")
    shutil.rmtree(tmp_path / "other")
    pairs = open_pairs(tmp_path)
    assert len(pairs) == len(TOYS) and "backup.tar" in str(pairs.skipped_files)


def test_the_lines_of_a_text_are_captions_where_the_set_is_for_retrieval(tmp_path: Path):
    texts = [f"{toy.caption}\n{toy.colour} {toy.shape}" for toy in TOYS]
    write_shards(tmp_path / "set" / "test", texts)
    (tmp_path / "set" / "dataset_type.txt").write_text("retrieval")
    pairs = open_pairs(tmp_path / "set", cache=tmp_path / "cache")
    require_toys(pairs, classes=False)
    assert [caption.text for caption in pairs[0].captions] == texts[0].split("\n")
    (tmp_path / "set" / "dataset_type.txt").write_text("classification")
    assert len(open_pairs(tmp_path / "set", cache=tmp_path / "cache")[0].captions) == 1


def write_class_folders(folder: Path) -> None:
    for toy, label in zip(TOYS, LABELS, strict=True):
        (folder / f"n{label:04}").mkdir(parents=True, exist_ok=True)
        (folder / f"n{label:04}" / f"{toy.key}.png").write_bytes(toy.png)


def test_class_folders_take_their_names_from_a_list_of_class_names(tmp_path: Path):
    write_class_folders(tmp_path / "set" / "val")
    there = sorted({toy.colour for toy in TOYS})
    (tmp_path / "set" / "classnames.txt").write_text("\n".join(there))
    pairs = open_pairs(tmp_path / "set" / "val")
    assert all(pair.meta["class"] == pair.captions[0].text == pair.id.split("/")[1].split("-")[0] for pair in pairs)
    (tmp_path / "set" / "classnames.txt").write_text("\n".join(there[1:]))
    with pytest.raises(UserError, match=r"6 class folders and 5 lines in classnames.txt"):
        open_pairs(tmp_path / "set" / "val")
    (tmp_path / "set" / "classnames.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*there[:-1], "a\x85b"]).encode())
    found = {pair.captions[0].text for pair in open_pairs(tmp_path / "set" / "val")}
    assert found == {*there[:-1], "a\x85b"}
    (tmp_path / "set" / "classnames.txt").write_text("\n".join(["a", "", *there[2:]]))
    with pytest.raises(UserError, match="names no class"):
        open_pairs(tmp_path / "set" / "val")


def test_other_class_names_are_other_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pair_sequence, "MIN_STORED_PAIRS", 1)
    write_class_folders(tmp_path / "set")
    for names in ("abcdef", "ghijkl"):
        (tmp_path / "set" / "classnames.txt").write_text("\n".join(names))
        pairs = open_pairs(tmp_path / "set", cache=tmp_path / "cache")
        assert set(PairIndex(pairs).texts[:]) == set(names)


def test_a_folder_of_shards_is_whole_for_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Path] = []

    def mine(spec: SourceSpec) -> ListedPairs:
        seen.append(spec.path)
        pair = Pair("a", FileSource("a.png"), (Caption("a"),), "a")
        return check_listed_pairs("mine", [pair], str(spec.path))

    monkeypatch.setitem(PAIR_FORMATS, "mine", mine)
    folder = write_shards(tmp_path / "set", [toy.caption for toy in TOYS])
    assert len(open_pairs(folder, format="mine")) == 1 and seen == [folder]
    for format in ("folder", ".tar", None):
        assert len(open_pairs(folder, format=format)) == len(TOYS)


def features(**others: object) -> dict[str, object]:
    return {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASSES}, **others}


def rows(toys: Sequence[Toy] = TOYS) -> dict[str, list[object]]:
    return {
        "image": [{"bytes": toy.png, "path": None} for toy in toys],
        "label": [CLASSES.index(toy.colour) for toy in toys],
    }


@pytest.mark.parametrize("form", ["stream", "file"])
def test_a_data_set_saved_to_disk_is_read_without_datasets(form: str, tmp_path: Path):
    folder = tmp_path / "set" / "test"
    folder.mkdir(parents=True)
    for number, part in enumerate((TOYS[:7], TOYS[7:])):
        table = pa.table(rows(part))
        new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with new(str(folder / f"data-0000{number}-of-00002.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "dataset_info.json").write_text(json.dumps({"features": features()}))
    (folder / "cache-0a.arrow").write_bytes(b"of datasets")
    require_toys(open_pairs(folder))
    names = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in (0, 1)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    pairs = open_pairs(folder)
    require_toys(pairs)
    assert pairs[0].meta == {"label": LABELS[0], "class": TOYS[0].colour}
    assert len({pair.image.version for pair in pairs}) == len(pairs) == len({pair.id for pair in pairs})
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(UserError, match="has the splits test; name one"):
        open_pairs(tmp_path / "set")


def write_parquet(file: Path, given: dict[str, object], columns: dict[str, list[object]]) -> Path:
    about = {"huggingface": json.dumps({"info": {"features": given}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(about), file, row_group_size=5)
    return file


def test_a_parquet_file_with_classes_in_place_of_captions(tmp_path: Path):
    require_toys(open_pairs(write_parquet(tmp_path / "test.parquet", features(), rows())))
    shapes = sorted({toy.shape for toy in TOYS})
    given = {"img": {"_type": "Image"}, "fine": {"_type": "ClassLabel", "names": shapes}}
    columns = {"img": rows()["image"], "fine": [shapes.index(toy.shape) for toy in TOYS], "coarse": rows()["label"]}
    given["coarse"] = {"_type": "ClassLabel", "names": CLASSES}
    file = write_parquet(tmp_path / "two.parquet", given, columns)
    with pytest.raises(UserError, match=r"which column has the captions\? its columns: img, fine"):
        open_pairs(file)
    pair = open_pairs(file, columns=ColumnNames(caption="fine"))[0]
    assert pair.captions[0].text == pair.meta["class"] == TOYS[0].shape and pair.meta["coarse"] == TOYS[0].colour


def test_a_parquet_file_of_datasets_with_captions_is_a_table(tmp_path: Path):
    text, picture = {"_type": "Value", "dtype": "string"}, {"_type": "Image"}
    (tmp_path / "a.jpg").write_bytes(b"image")
    paths = {"image": ["a.jpg"], "caption": ["a dog"]}
    pairs = open_pairs(write_parquet(tmp_path / "paths.parquet", {"image": text, "caption": text}, paths))
    assert pairs[0].image.read() == b"image" and pairs[0].captions[0].text == "a dog"
    cell: list[object] = [{"bytes": b"image", "path": None}]
    given = {"image": picture, "mask": picture, "caption": text}
    pairs = open_pairs(write_parquet(tmp_path / "two.parquet", given, paths | {"image": cell, "mask": cell}))
    assert pairs[0].image.read() == b"image"


def test_a_parquet_file_of_classes_without_rows_is_refused(tmp_path: Path):
    empty = pa.table(rows()).slice(0, 0)
    about = {"huggingface": json.dumps({"info": {"features": features()}})}
    pq.write_table(empty.replace_schema_metadata(about), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="has no pairs"):
        open_pairs(tmp_path / "none.parquet")


def test_a_cell_is_bytes_or_a_path(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"image")
    for cell in (b"image", {"bytes": b"image"}, {"bytes": None, "path": "a.png"}, "a.png"):
        assert image_of_cell(cell, str(tmp_path), "row-1") == b"image"
    for cell, wanted in ((5, "row-1 holds int"), (None, "holds no image"), ("../a.png", "leads out")):
        with pytest.raises(UserError, match=wanted):
            image_of_cell(cell, str(tmp_path), "row-1")


def test_lists_of_classes_are_for_several_classes_an_image(tmp_path: Path):
    given = features(label={"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": CLASSES}})
    file = write_parquet(tmp_path / "test.parquet", given, rows() | {"label": [[label, 0] for label in LABELS]})
    assert open_pairs(file)[0].meta["classes"] == [TOYS[0].colour, CLASSES[0]]


def test_elevater_reads_zips_and_folders(tmp_path: Path):
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    with zipfile.ZipFile(tmp_path / "test.zip", "w") as archive:
        for toy in TOYS[:6]:
            archive.writestr(f"in/{toy.key}.png", toy.png)
    lines = [f"test.zip@in/{toy.key}.png {label}" for toy, label in zip(TOYS[:6], LABELS, strict=False)]
    for toy, label in zip(TOYS[6:], LABELS[6:], strict=True):
        (tmp_path / f"{toy.key}.png").write_bytes(toy.png)
        lines.append(f"{toy.key}.png {label}")
    (tmp_path / "test.txt").write_text("\n".join(lines) + "\n")
    pairs = open_pairs(tmp_path)
    require_toys(pairs)
    assert pairs[0].meta == {"label": LABELS[0], "class": TOYS[0].colour}
    (tmp_path / "test.txt").write_text("\n".join([*lines[:-1], f"{TOYS[-1].key}.png 0,1"]))
    assert open_pairs(tmp_path)[-1].meta == {"classes": CLASSES[:2]}
    (tmp_path / "train.txt").write_text("\n".join(lines[:5]))
    train = open_pairs(tmp_path / "train.txt")
    assert [pair.meta["label"] for pair in train] == LABELS[:5] and train[0].image.read() == TOYS[0].png
    for line, message in (
        ("a.png 6", "'a.png 6'; IMAGE NUMBER is wanted, a number below 6"),
        ("gone.zip@a.png 1", "names images in gone.zip, which is not in"),
        ("../a.png 1", "leads out of"),
    ):
        (tmp_path / "test.txt").write_text(line)
        with pytest.raises(UserError, match=message):
            open_pairs(tmp_path)
    (tmp_path / "labels.txt").unlink()
    with pytest.raises(UserError, match=r"train.txt is read as a list of ELEVATER, .*labels.txt, are not there"):
        open_pairs(tmp_path / "train.txt")


def write_images(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for toy in TOYS:
        (folder / "images" / f"{toy.key}.png").write_bytes(toy.png)


def test_xtd_has_a_caption_in_each_language(tmp_path: Path):
    write_images(tmp_path)
    (tmp_path / "test_image_names.txt").write_text("".join(f"{toy.key}.png\n" for toy in TOYS))
    for language in ("en", "rot"):
        (tmp_path / f"test_1kcaptions_{language}.txt").write_text("".join(f"{t.caption} {language}\n" for t in TOYS))
    pairs = open_pairs(tmp_path)
    require_toys(pairs, classes=False)
    assert [tuple(caption) for caption in pairs[0].captions] == [
        (f"{TOYS[0].caption} {language}", language) for language in ("en", "rot")
    ]
    (tmp_path / "images" / f"{TOYS[3].key}.png").unlink()
    with pytest.raises(UserError, match=f"lacks 1 of its images, such as {TOYS[3].key}.png"):
        open_pairs(tmp_path)
    (tmp_path / "test_1kcaptions_rot.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"test_1kcaptions_rot.txt has 1 lines for the 12 images"):
        open_pairs(tmp_path)


def test_xm3600_has_several_captions_in_each_language(tmp_path: Path):
    write_images(tmp_path)
    records = [
        {"image/key": toy.key, "image/locale": "en", "en": {"caption": [toy.caption, "b"]}, "sw": {"caption": ["c"]}}
        for toy in TOYS
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs = open_pairs(tmp_path)
    require_toys(pairs, classes=False)
    assert [tuple(caption) for caption in pairs[0].captions] == [(TOYS[0].caption, "en"), ("b", "en"), ("c", "sw")]
    (tmp_path / "captions.jsonl").write_text('{"image": "a"}\n')
    with pytest.raises(UserError, match=r"line 1 is not as in XM3600"):
        open_pairs(tmp_path)
