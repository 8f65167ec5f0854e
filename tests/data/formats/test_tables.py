"""Tables: caption forms, columns, repeated images, exact byte ranges; each fast reader beside a slow obvious one."""

import csv
import gzip
import json
import random
import subprocess
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bad_inputs import refused
from clasp.data.formats.ids import number_duplicates
from clasp.data.pairs import ColumnNames, open_pairs
from clasp.types import Caption, UserError
from toydata import toys, write_jsonl, write_parquet

# line breaks, quotes, delimiters, scripts of one to four bytes, nothing
CELLS = ["a dog", 'he said "no"', "two\nlines", "crlf\r\nline", "a, b\tc", "ein Hündchen", "ถนน", "🐈 cat", '"', "x"]


def jsonl(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, delimiter", [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
def test_cells_equal_those_of_reading_the_whole_file(
    kind: str, delimiter: str, newline: str, mark: str, tmp_path: Path
):
    chance = random.Random(0)
    rows = [[f"{n}.jpg", chance.choice(CELLS), "".join(chance.choices(CELLS, k=3))] for n in range(300)]
    file = tmp_path / f"pairs.{kind}"
    with file.open("w", encoding=mark, newline="") as handle:
        writer = csv.writer(handle, delimiter=delimiter, lineterminator=newline)
        writer.writerow(["filepath", "title", "note"])
        for row in rows:
            writer.writerow(row)
            handle.write(newline * chance.randint(0, 1))  # empty lines
    pairs = open_pairs(file)
    with file.open(encoding=mark, newline="") as handle:
        slow = [row for row in csv.DictReader(handle, delimiter=delimiter)]
    order = chance.sample(range(300), 300)
    for number, pair in zip(order, pairs.subset(order), strict=True):
        assert (
            (pair.id, pair.meta["note"]) == (slow[number]["filepath"], slow[number]["note"]) == tuple(rows[number][::2])
        )
        assert pair.captions == (Caption(slow[number]["title"].strip()),)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii", [True, False])
def test_json_lists_and_lines_equal_those_of_reading_the_whole_file(indent: int | None, ascii: bool, tmp_path: Path):
    chance = random.Random(1)
    rows = [{"image": f"{n}.jpg", "image_id": n // 2, "caption": chance.choice(CELLS), "n": n} for n in range(200)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii), "utf-8")
    lines = "\n\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)  # blank lines, none at the end
    (tmp_path / "pairs.jsonl").write_text(lines, "utf-8")
    listed, lined = open_pairs(tmp_path / "pairs.json"), open_pairs(tmp_path / "pairs.jsonl")
    for number in chance.sample(range(200), 200):
        row = rows[number]
        for pair in (listed[number], lined[number]):
            assert pair.id == row["image"] and pair.captions == (Caption(row["caption"].strip()),)
        assert listed[number].group == str(number // 2) and listed[number].meta == {"n": number}
        assert lined[number].group == row["image"] and lined[number].meta == {"n": number, "image_id": number // 2}


def test_gz_is_the_same(tmp_path: Path):
    source = write_jsonl(toys(5), tmp_path)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    for cache in (None, tmp_path / "cache"):
        pairs = open_pairs(packed, cache=cache)
        assert [pair.image.read() for pair in pairs] == [toy.png for toy in toys(5)]  # relative to the .gz
    assert len(list((tmp_path / "cache").glob("unpacked-*.jsonl"))) == 1
    packed.write_bytes(packed.read_bytes()[:-20])
    refused(packed, "packed.jsonl.gz is truncated")
    packed.write_bytes(b"plain text")
    refused(packed, "packed.jsonl.gz cannot be unpacked")


def test_a_long_table_is_opened_in_little_time_and_memory(tmp_path: Path):
    # in a process of its own, because the type checks of the tests take twenty times as long as the reading
    measure = """
import sys, time, tracemalloc
from clasp.data.pairs import open_pairs
start = time.process_time()
assert open_pairs(sys.argv[1])[77_777].id == "0077777.jpg"
seconds = time.process_time() - start
tracemalloc.start()
pairs = open_pairs(sys.argv[2])
print(seconds, *tracemalloc.get_traced_memory())
"""
    lines = [f'{{"image": "{n:07}.jpg", "caption": "number {n}, {"x" * 200}"}}\n' for n in range(100_000)]
    (tmp_path / "long.jsonl").write_text("".join(lines))
    (tmp_path / "part.jsonl").write_text("".join(lines[:20_000]))
    files = [tmp_path / "long.jsonl", tmp_path / "part.jsonl"]
    run = subprocess.run([sys.executable, "-c", measure, *files], capture_output=True, text=True, check=True)
    seconds, kept, peak = map(float, run.stdout.split())
    assert seconds < 15  # about 1.5; a million lines take ten times as long
    assert kept < 20_000 * 50 and peak < 20_000 * 150  # bytes; the file has 5 million


def test_an_index_in_a_cache_is_used_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, cache = write_jsonl(toys(5), tmp_path), tmp_path / "cache"
    before = open_pairs(source, cache=cache)
    monkeypatch.setattr("clasp.data.formats.tables.IdCollector", lambda name: pytest.fail("the table was read again"))
    assert list(open_pairs(source, cache=cache)) == list(before)
    with pytest.raises(pytest.fail.Exception):
        open_pairs(source)
    with pytest.raises(pytest.fail.Exception):
        open_pairs(source, cache=cache, columns=ColumnNames(group="image"))
    source.write_text(source.read_text() + json.dumps({"image": "new.jpg", "caption": "new"}))
    with pytest.raises(pytest.fail.Exception):
        open_pairs(source, cache=cache)
    monkeypatch.undo()
    assert len(open_pairs(source, cache=cache)) == 6
    assert not list(cache.glob("*.part"))


# --- captions and columns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption, wanted",
    [
        (" a dog ", [("a dog", "fr")]),
        (["a dog", "a puppy"], [("a dog", "fr"), ("a puppy", "fr")]),
        ({"en": "a dog", "sw": ["mbwa", "kijibwa"], "so": None}, [("a dog", "en"), ("mbwa", "sw"), ("kijibwa", "sw")]),
        (
            [{"text": "mbwa", "language": "sw"}, {"text": "chien"}, "dog"],
            [("mbwa", "sw"), ("chien", "fr"), ("dog", "fr")],
        ),
        ({"text": "mbwa", "language": "sw"}, [("mbwa", "sw")]),
    ],
)
def test_caption_forms(caption: object, wanted: list[tuple[str, str]], tmp_path: Path):
    row = {"image": "a.jpg", "caption": caption, "language": "fr"}
    file = jsonl(tmp_path / "pairs.jsonl", row)
    assert open_pairs(file)[0].captions == tuple(Caption(*of) for of in wanted)
    table = tmp_path / "pairs.parquet"
    if not isinstance(caption, list) or isinstance(caption[0], str):
        pq.write_table(pa.Table.from_pylist([row]), table)
        assert open_pairs(table)[0].captions == tuple(Caption(*of) for of in wanted)


def test_a_parquet_map_of_languages(tmp_path: Path):
    kind = pa.map_(pa.string(), pa.list_(pa.string()))
    captions = pa.array([[("en", ["a dog", "a puppy"]), ("sw", ["mbwa"])]], kind)
    pq.write_table(pa.table({"image": ["a.jpg"], "caption": captions}), tmp_path / "pairs.parquet")
    captions = (Caption("a dog", "en"), Caption("a puppy", "en"), Caption("mbwa", "sw"))
    assert open_pairs(tmp_path / "pairs.parquet")[0].captions == captions


@pytest.mark.parametrize("caption", [None, [], "", "  ", ["a dog", ""], {}, {"en": ""}, {"sw": None}])
def test_empty_captions_of_every_form(caption: object, tmp_path: Path):
    good = {"image": "a.jpg", "caption": "a dog"}
    refused(jsonl(tmp_path / "pairs.jsonl", good, good | {"caption": caption}), "1 of 2 pairs have an empty", "line 2")


def test_columns_by_name_and_the_rest_as_meta(tmp_path: Path):
    file = tmp_path / "pairs.csv"
    file.write_text("file,text,key,tongue,concept,style\na.jpg,mbwa,7,sw,dog,flat\n")
    columns = ColumnNames(image="file", caption="text", id="key", language="tongue", group="concept")
    pair = open_pairs(file, columns=columns)[0]
    assert (pair.id, pair.group, pair.captions) == ("7", "dog", (Caption("mbwa", "sw"),))
    assert pair.meta == {"style": "flat"} and pair.image.name == str(tmp_path / "a.jpg")


def test_missing_columns_name_those_there_are_and_the_nearest(tmp_path: Path):
    file = tmp_path / "pairs.csv"
    file.write_text("filepath,titel\na.jpg,a dog\n")
    refused(file, "no column 'title'", "'filepath', 'titel'", "did you mean 'titel'?")
    refused(file, "no column 'concept'", caption="titel", group="concept")
    lines = jsonl(tmp_path / "a.jsonl", {"image": "a.jpg", "caption": "a"}, {"img": "b.jpg", "caption": "b"})
    refused(lines, "line 2 has no column 'image'", "'img', 'caption'", "did you mean 'img'?")
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": ["a.jpg"], "captions": ["a"]}), table)
    refused(table, "a.parquet has no column 'caption'", "did you mean 'captions'?")


@pytest.mark.parametrize(
    "name, text, wanted",
    [
        ("a.jsonl", '{"image": "a.jpg", "caption": "a"}\n{"image": ', "line 2 is not JSON"),
        ("a.jsonl", '["a.jpg", "a"]', "line 1 must be a JSON object"),
        ("a.jsonl", '{"image": 5, "caption": "a"}', "line 1 names no image"),
        ("a.jsonl", '{"image": "a.jpg", "caption": 5}', "a caption must be a text"),
        ("a.json", '[{"image": "a.jpg", "caption": "a"}', "a.json is not JSON"),
        ("a.json", '[{"image": "a.jpg", "caption": "a"} {}]', "a.json is not JSON"),
        ("a.json", '[{"image": "a.jpg", "caption": "a"}] x', "a.json is not JSON"),
        ("a.json", '{"images": [], "annotations": []}', "must hold a list of objects"),
        ("a.json", "[5]", "entry 1 must be an object"),
        ("a.csv", "filepath,title\na.jpg,a dog, and a cat\n", "line 2 has 3 cells and the first line has 2"),
        ("a.csv", 'filepath,title\nb.jpg,b\na.jpg,"never closed\nc.jpg,c\n', "line 3 cannot be read as cells"),
        ("a.csv", "filepath,filepath\na.jpg,a\n", "two columns of one name"),
    ],
)
def test_damaged_tables_are_refused_with_the_place(name: str, text: str, wanted: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, wanted)


def test_text_that_is_not_utf8_is_refused_with_the_place(tmp_path: Path):
    file = tmp_path / "pairs.csv"
    file.write_bytes("filepath,title\na.jpg,ok\nb.jpg,Hündchen\n".encode("latin-1"))
    refused(file, "line 3 is not UTF-8")
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_bytes('[{"caption": "Hündchen"}]'.encode("latin-1"))
        refused(tmp_path / name, name, "is not JSON")


INVISIBLE = ["\u200b", " \u200d\ufeff ", "\u3164", "\u00ad\u2060", "\u2800", "\ufe0f", "\x01", "\U000e0001"]


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_captions_that_show_nothing_are_empty(text: str, tmp_path: Path):
    good = {"image": "a.jpg", "caption": "a dog"}
    refused(jsonl(tmp_path / "pairs.jsonl", good, good | {"caption": text}), "1 of 2 pairs have an empty", "line 2")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"x")
    (folder / "a.txt").write_text(text, "utf-8")
    refused(folder, "1 of 1 pairs have an empty caption")


@pytest.mark.parametrize("text", ["🐈", "❤\ufe0f", "ك\u200cت", "ถ", "。", "~"])
def test_captions_that_show_something_are_none_of_these(text: str, tmp_path: Path):
    assert open_pairs(jsonl(tmp_path / "a.jsonl", {"image": "a.jpg", "caption": text}))[0].captions[0].text == text


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_cell_that_is_a_json_list_or_object_is_several_captions(kind: str, tmp_path: Path):
    rows = [
        {"image": "a.jpg", "caption": '["a cat", "a red cat"]', "language": '["en", "fr"]'},
        {"image": "b.jpg", "caption": ' {"en": ["a dog"], "sw": "mbwa"} ', "language": ""},
        {"image": "c.jpg", "caption": "[sic] a cat [of sorts]", "language": "en"},
    ]
    file = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        jsonl(file, *rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        with file.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    a, b, c = open_pairs(file, columns=ColumnNames(image="image", caption="caption"))
    assert a.captions == (Caption("a cat", "en"), Caption("a red cat", "fr"))
    assert b.captions == (Caption("a dog", "en"), Caption("mbwa", "sw"))
    assert c.captions == (Caption("[sic] a cat [of sorts]", "en"),)


@pytest.mark.parametrize("cell", ["['a cat', 'a red cat']", "['a cat' 'a red cat']", '["a cat", "a red cat",]'])
def test_a_cell_that_only_looks_like_a_list_is_refused(cell: str, tmp_path: Path):
    rows = {"image": "a.jpg", "caption": cell}
    refused(jsonl(tmp_path / "a.jsonl", rows), "line 1", "looks like a list and is not JSON", '["a dog", "a puppy"]')


def test_parallel_lists_of_captions_and_languages_are_zipped(tmp_path: Path):
    row = {"image": "a.jpg", "caption": ["a dog", "ein Hund", "mbwa"], "language": ["en", "de", None]}
    wanted = (Caption("a dog", "en"), Caption("ein Hund", "de"), Caption("mbwa"))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([row]))
    for file in (jsonl(tmp_path / "a.jsonl", row), tmp_path / "a.parquet", tmp_path / "a.json"):
        assert open_pairs(file)[0].captions == wanted
    one = jsonl(tmp_path / "one.jsonl", {"image": "a.jpg", "caption": "a dog", "language": ["en"]})
    assert open_pairs(one)[0].captions == (Caption("a dog", "en"),)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(b"x")
    (tmp_path / "folder" / "a.json").write_text(json.dumps({"captions": row["caption"], "language": row["language"]}))
    assert open_pairs(tmp_path / "folder")[0].captions == wanted


WRONG_TYPES = [
    ({"caption": ["a", "b"], "language": ["en"]}, "1 languages are given for 2 captions"),
    ({"caption": {"en": "a"}, "language": ["en"]}, "1 languages are given for 1 captions"),
    ({"language": 5}, "a language must be a text"),
    ({"language": {"code": "en"}}, "a language must be a text"),
    ({"caption": [{"text": "a", "language": 5}]}, "a language must be a text"),
    ({"id": ["a"]}, "'id' must be a text or a whole number, not ['a']"),
    ({"id": 1.5}, "'id' must be a text or a whole number, not 1.5"),
    ({"id": True}, "'id' must be a text or a whole number, not True"),
    ({"group": {"name": "dog"}}, "'group' must be a text or a whole number"),
    ({"group": float("nan")}, "'group' must be a text or a whole number, not nan"),
    ({"caption": True}, "a caption must be a text"),
    ({"image": ["a.jpg"]}, "a path is wanted"),
    ({"image": "a\0.jpg"}, "cannot be a file name"),
]


@pytest.mark.parametrize("changed, wanted", WRONG_TYPES, ids=lambda value: repr(value)[:40])
def test_a_value_of_the_wrong_type_is_never_made_a_text(changed: dict, wanted: str, tmp_path: Path):
    good = {"image": "a.jpg", "caption": "a dog", "id": "a", "language": "en", "group": "dog"}
    refused(jsonl(tmp_path / "a.jsonl", good, good | changed), "line 2", wanted)
    (tmp_path / "a.json").write_text(json.dumps([good, good | changed]))
    refused(tmp_path / "a.json", "entry 2", wanted) if "group" not in changed else None


@pytest.mark.parametrize("type", [pa.float64(), pa.bool_(), pa.date32(), pa.binary()], ids=str)
@pytest.mark.parametrize("column", ["id", "group", "language", "caption"])
def test_a_parquet_column_of_the_wrong_type_is_refused(column: str, type: pa.DataType, tmp_path: Path):
    cell = {pa.binary(): b"x", pa.bool_(): True}.get(type, 1)
    cells = {"image": ["a.jpg"], "caption": ["a dog"], column: pa.array([cell], type)}
    pq.write_table(pa.table(cells), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", column)


def test_whole_numbers_are_ids_and_groups(tmp_path: Path):
    file = jsonl(tmp_path / "a.jsonl", {"image": "a.jpg", "caption": "a", "id": 7, "group": 8})
    assert (open_pairs(file)[0].id, open_pairs(file)[0].group) == ("7", "8")


def test_two_columns_or_keys_of_one_name_are_refused(tmp_path: Path):
    names = ["image", "caption", "caption"]
    table = pa.Table.from_arrays([pa.array([text]) for text in ("a.jpg", "one", "two")], names)
    pq.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "two columns of one name: 'caption'")
    twice = '{"image": "a.jpg", "caption": "one", "caption": "two"}'
    (tmp_path / "a.jsonl").write_text(twice)
    refused(tmp_path / "a.jsonl", "line 1", "the key 'caption' is given twice")
    (tmp_path / "a.json").write_text(f"[{twice}]")
    refused(tmp_path / "a.json", "the key 'caption' is given twice")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(b"x")
    (tmp_path / "folder" / "a.json").write_text(twice)
    refused(tmp_path / "folder", "the key 'caption' is given twice")


@pytest.mark.parametrize("column", ["caption", "id", "group", "language", "image"])
@pytest.mark.parametrize("text", ["half \ud83d", "\udc00"], ids=ascii)
def test_half_a_character_is_named_with_its_row(column: str, text: str, tmp_path: Path):
    good = {"image": "a.jpg", "caption": "a dog", "id": "a", "language": "en", "group": "dog"}
    lines = json.dumps(good) + "\n" + json.dumps(good | {column: text})
    (tmp_path / "a.jsonl").write_text(lines)
    refused(tmp_path / "a.jsonl", "line 2", "cannot be a file name" if column == "image" else "lone surrogate").encode()
    (tmp_path / "a.json").write_text(f"[{lines.replace(chr(10), ',')}]")
    if column != "group":
        refused(tmp_path / "a.json", "entry 2").encode()
    for wrapped in ([text], {"en": text}, [{"text": text}]) if column == "caption" else ():
        refused(jsonl_ascii(tmp_path / "b.jsonl", good | {"caption": wrapped}), "line 1", "lone surrogate").encode()


def jsonl_ascii(file: Path, row: object) -> Path:
    file.write_text(json.dumps(row))
    return file


def test_a_file_name_that_is_not_utf8_may_be_an_image(tmp_path: Path):
    name = "caf\udce9.jpg"  # as Python tells the bytes b"caf\xe9.jpg"
    (tmp_path / name).write_bytes(b"x")
    pair = open_pairs(jsonl_ascii(tmp_path / "a.jsonl", {"image": name, "caption": "a"}))[0]
    assert pair.id == name and pair.image.read() == b"x"


@pytest.mark.parametrize("told, there", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_path_whose_accents_are_encoded_in_another_way_is_found(told: str, there: str, tmp_path: Path):
    said, name = (unicodedata.normalize(form, "été/é.jpg") for form in (told, there))  # pyright: ignore[reportArgumentType]
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"x")
    pair = open_pairs(jsonl(tmp_path / "a.jsonl", {"image": said, "caption": "summer"}))[0]
    assert pair.id == said and pair.image.read() == b"x" and pair.image.version != "missing"


# --- separators, encodings, line ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("quoted", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_the_separator_is_found(kind: str, separator: str, quoted: int, tmp_path: Path):
    file = tmp_path / f"pairs.{kind}"
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter=separator, quoting=quoted)
        writer.writerows([["filepath", "title"], *([f"{n}.jpg", cell] for n, cell in enumerate(CELLS))])
    for _ in range(2):
        pairs = open_pairs(file, cache=tmp_path / "cache")
        assert [pair.captions[0].text for pair in pairs] == [cell.strip() for cell in CELLS]


def test_where_no_separator_gives_the_columns_those_there_are_are_named(tmp_path: Path):
    (tmp_path / "a.csv").write_text("file;titel\na.jpg;a dog\n")
    refused(tmp_path / "a.csv", "no column 'filepath'", "'file', 'titel'")
    (tmp_path / "b.csv").write_text("filepath;title\na.jpg;a dog; a cat\n")
    refused(tmp_path / "b.csv", "line 2 has 3 cells", "cut at ';'")


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=ascii)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_encodings_with_a_mark_and_line_ends_of_every_system_are_read(
    kind: str, encoding: str, newline: str, tmp_path: Path
):
    captions = ["ein Hündchen", "ถนน", "🐈 cat"]
    if kind == "csv":
        lines = ["filepath,title", *(f"{n}.jpg,{caption}" for n, caption in enumerate(captions))]
    else:
        rows = [{"image": f"{n}.jpg", "caption": caption} for n, caption in enumerate(captions)]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        lines = lines if kind == "jsonl" else ["[", *[f"{line}," for line in lines[:-1]], lines[-1], "]"]
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    file = tmp_path / f"pairs.{kind}"
    file.write_bytes((mark + newline.join(lines) + newline).encode(encoding))
    for _ in range(2):
        pairs = open_pairs(file, cache=tmp_path / "cache")
        assert [pair.captions[0].text for pair in reversed(pairs)] == captions[::-1]
    packed = tmp_path / f"packed.{kind}.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert [pair.captions[0].text for pair in open_pairs(packed)] == captions


def test_a_copy_follows_its_file(tmp_path: Path):
    file = tmp_path / "a.csv"
    for text in ("one", "two, three".replace(",", " and")):
        file.write_bytes(f"filepath,title\na.jpg,{text}\n".encode("utf-16"))
        assert open_pairs(file, cache=tmp_path / "cache")[0].captions == (Caption(text),)


@pytest.mark.parametrize(
    "data, wanted",
    [
        ("filepath,title\na.jpg,a\n".encode("utf-16-le"), "zero bytes"),
        ("filepath,title\na.jpg,a\n".encode("utf-16")[:-1], "not UTF-16 text"),
        (b"filepath,title\na.jpg," + b"x" * 131_073, "line 2 cannot be read as cells: a cell is longer than 131,072"),
        (
            b'filepath,title\na.jpg,"never closed\n',
            "line 2 cannot be read as cells: unexpected end of data; is a double",
        ),
        (
            b'filepath,title\na.jpg,"never closed\n' + b"b.jpg,b\n" * 20_000,
            "longer than 131,072 characters; is a double",
        ),
        (b'filepath,"title\na.jpg,a\n', "line 1 cannot be read as cells"),
    ],
    ids=["no mark", "cut", "long cell", "open quote", "open quote in a long file", "open quote in the header"],
)
def test_what_cannot_be_cut_into_cells_is_one_line(data: bytes, wanted: str, tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(data)
    refused(tmp_path / "a.csv", wanted)


def test_a_cell_of_the_longest_allowed_is_read(tmp_path: Path):
    (tmp_path / "a.csv").write_text("filepath,title\na.jpg," + "x" * 131_072)
    assert len(open_pairs(tmp_path / "a.csv")[0].captions[0].text) == 131_072


# --- ids -------------------------------------------------------------------------------------------------------------


def test_rows_of_one_image_are_one_group_with_ids_that_do_not_depend_on_order(tmp_path: Path):
    rows = [{"image": image, "caption": c} for image in ("a.jpg", "./b.jpg") for c in ("one", "two", "three")]
    rows += [{"image": "c.jpg", "caption": "alone"}, rows[0]]  # the first row comes twice, word for word
    ids = {}
    for order in (rows, rows[::-1], rows[3:] + rows[:3]):
        pairs = open_pairs(jsonl(tmp_path / "pairs.jsonl", *order))
        ids[len(ids)] = sorted((pair.id, pair.captions[0].text) for pair in pairs)
        assert {pair.group for pair in pairs} == {"a.jpg", "b.jpg", "c.jpg"}
    assert ids[0] == ids[1] == ids[2]
    assert [id for id, _ in ids[0]] == [
        "a.jpg#1",
        "a.jpg#2",
        "a.jpg#3",
        "a.jpg#4",
        "b.jpg#1",
        "b.jpg#2",
        "b.jpg#3",
        "c.jpg",
    ]


def test_explicit_ids_may_share_an_image_but_not_repeat(tmp_path: Path):
    rows = [{"image": "a.jpg", "caption": "x", "id": id} for id in ("1", 2, "3")]
    pairs = open_pairs(jsonl(tmp_path / "pairs.jsonl", *rows))
    assert [pair.id for pair in pairs] == ["1", "2", "3"] and {pair.group for pair in pairs} == {"a.jpg"}
    rows += [{"image": "b.jpg", "caption": "y", "id": "2"}]
    refused(jsonl(tmp_path / "pairs.jsonl", *rows), "the id '2' is given twice", "pairs 2 and 4")
    table = pa.table({"image": ["a.jpg", "b.jpg"], "caption": ["a", "b"], "id": [5, 5]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    refused(tmp_path / "pairs.parquet", "the id '5' is given twice")


def test_twins_equal_the_slow_count():
    chance = np.random.default_rng(0)
    images = chance.integers(0, 60, 200).astype(np.uint64)
    texts = chance.permutation(200).astype(np.uint64)
    for row, twin in enumerate(number_duplicates(images, texts)):
        others = sorted(texts[images == images[row]])
        assert twin == (0 if len(others) == 1 else others.index(texts[row]) + 1)


def test_a_damaged_page_is_named(tmp_path: Path):
    """The footer is whole, so the file opens; its pages are not."""
    file = write_parquet(toys(5), tmp_path)
    data = bytearray(file.read_bytes())
    for place in range(8, data.index(b"PAR1", 4) // 2, 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        with suppress(UserError):  # one line, or the bytes were of no text that is read
            for pair in open_pairs(file):
                assert pair.captions


# --- parquet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["path", "bytes", "struct"])
def test_parquet_cells_in_any_order(images: str, tmp_path: Path):
    drawn = toys(23)
    pairs = open_pairs(write_parquet(drawn, tmp_path, images, group_rows=4))  # pyright: ignore[reportArgumentType]
    for number in random.Random(0).sample(range(23), 23):
        assert pairs[number].image.read() == drawn[number].png
        assert pairs[number].captions == (Caption(drawn[number].caption),)
        name = f"images/{drawn[number].key}.png"
        assert pairs[number].id == pairs[number].group == (f"row-{number}" if images == "bytes" else name)
        assert pairs[number].meta == {}


def test_parquet_struct_without_bytes_is_a_path_and_without_either_an_error(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"image")
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}]
    table = pa.table({"image": cells, "caption": ["a", "b"], "other": [b"mask", b"mask"]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    pairs = open_pairs(tmp_path / "pairs.parquet")
    assert pairs[0].image.read() == b"image" and pairs[0].meta == {}  # other bytes are not read along
    with pytest.raises(UserError, match="row-1 holds no image"):
        pairs[1].image.read()


def test_parquet_that_is_none_or_holds_no_images(tmp_path: Path):
    file = write_parquet(toys(3), tmp_path)
    file.write_bytes(file.read_bytes()[:-30])
    refused(file, "is not a whole parquet file")
    pq.write_table(pa.table({"image": [1.5], "caption": ["a"]}), file)
    refused(file, "column 'image' holds double", "paths (string), bytes (binary)")
    pq.write_table(pa.table({"image": ["a"], "caption": ["a"]}).slice(0, 0), file)
    refused(file, "has no pairs")


def test_images_of_two_columns_are_of_two_versions(tmp_path: Path):
    """A feature cache stands on the version, and rows without an id column have one id in both readings."""
    cells = {"image": [toy.png for toy in toys(3)], "other": [toy.png for toy in toys(3, seed=1)]}
    pq.write_table(pa.table({**cells, "caption": ["a", "b", "c"]}), tmp_path / "pairs.parquet")
    one, other = (open_pairs(tmp_path / "pairs.parquet", columns=ColumnNames(image=name)) for name in cells)
    assert [pair.id for pair in one] == [pair.id for pair in other] and one.version != other.version


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
def test_json_nested_too_deeply_is_one_line(name: str, tmp_path: Path):
    file = tmp_path / name
    nested = "[" * 100_000 + "]" * 100_000
    file.write_text(nested if name.endswith("jsonl") else f'[{{"image": {nested}}}]')
    refused(file, "nested too deeply")
