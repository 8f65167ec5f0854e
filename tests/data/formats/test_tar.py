"""Tars: the offset index beside tarfile's own reading, long names and links, samples, and every way to be damaged."""

import gzip
import io
import json
import random
import tarfile
from pathlib import Path

import pytest

from bad_inputs import refused
from clasp.data.formats import index_cache
from clasp.data.pairs import ColumnNames, open_pairs
from clasp.types import Caption, UserError
from toydata import Toy, add_member, toys, write_tar

TOYS = toys(6)


def tar_of(file: Path, **members: bytes | str | dict[str, object]) -> Path:
    """Members by name, with ``__`` for the dot."""
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            text = json.dumps(data) if isinstance(data, dict) else data
            add_member(tar, name.replace("__", "."), text.encode() if isinstance(text, str) else text)
    return file


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_those_tarfile_reads(format: int, tmp_path: Path):
    long = [
        toy._replace(key=toy.key if format == tarfile.USTAR_FORMAT else f"é/{'long' * 40}/{toy.key}") for toy in TOYS
    ]
    file = write_tar([*TOYS, *(toy._replace(key=f"{toy.key}x") for toy in long)], tmp_path / "a.tar", format)
    pairs = open_pairs(file)
    with tarfile.open(file) as tar:
        slow = {m.name: tar.extractfile(m).read() for m in tar}  # pyright: ignore[reportOptionalMemberAccess]
    assert len(pairs) == 12
    for number in random.Random(0).sample(range(12), 12):
        pair = pairs[number]
        assert pair.image.read() == slow[f"{pair.id}.png"] and pair.image.name == f"{file}::{pair.id}.png"
        assert pair.captions == (Caption(slow[f"{pair.id}.txt"].decode()),)


def test_hard_links_folders_and_dot_names(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("./deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add_member(tar, "./deep/a.png", b"image")
        add_member(tar, "./deep/a.txt", b"a dog")
        for name, target in (("./deep/b.png", "./deep/a.png"), ("./deep/b.txt", "./deep/a.txt")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
        add_member(tar, "deep/._a.png", b"left behind")
    pairs = open_pairs(tmp_path / "a.tar")
    assert [(pair.id, pair.image.read()) for pair in pairs] == [("deep/a", b"image"), ("deep/b", b"image")]
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.addfile(link)
    refused(tmp_path / "b.tar", "'deep/b.txt' is a link to 'deep/a.txt', which is not in the tar")
    link.type = tarfile.SYMTYPE
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        tar.addfile(link)
    refused(tmp_path / "c.tar", "'deep/b.txt' is a link")


# --- samples ---------------------------------------------------------------------------------------------------------


def test_captions_of_txt_and_json_are_joined_and_the_rest_is_meta(tmp_path: Path):
    file = tar_of(
        tmp_path / "a.tar",
        a__txt="one",
        b__json={"caption": "two", "width": 64},
        a__jpg=b"A",
        a__json={"captions": ["one", "uno"], "text": "kept as meta", "language": "es"},
        b__jpg=b"B",
        c__seg__png=b"mask, no image",
        c__webp=b"C",
        c__json={"text": {"sw": "tatu"}},
        d__txt="no image of this name",
    )
    a, b, c = open_pairs(file)
    assert a.captions == (Caption("one", "es"), Caption("uno", "es")) and a.meta == {"text": "kept as meta"}
    assert b.captions == (Caption("two"),) and b.meta == {"width": 64}
    assert c.captions == (Caption("tatu", "sw"),) and c.image.read() == b"C"


def test_classes(tmp_path: Path):
    file = tar_of(tmp_path / "a.tar", a__jpg=b"A", a__cls="1", b__jpg=b"B", b__cls="0", b__txt="a cat")
    refused(file, "1 of 2 pairs have an empty caption", "a.tar::a.jpg")
    (tmp_path / "classnames.txt").write_text("house cat\ndog\n")
    a, b = open_pairs(file)
    assert (a.captions, a.group, a.meta) == ((Caption("dog"),), "a", {"label": 1, "class": "dog"})
    assert (b.captions, b.group, b.meta) == ((Caption("a cat"),), "b", {"label": 0, "class": "house cat"})
    for wrong in ("2", "-1", "dog"):
        refused(tar_of(file, a__jpg=b"A", a__cls=wrong), "a.cls must hold a class number below 2", repr(wrong))


def test_named_keys_of_json(tmp_path: Path):
    said = {"concept": "dog", "name": "mbwa", "tongue": "sw", "key": 7, "caption": "a dog"}
    file = tar_of(tmp_path / "a.tar", a__jpg=b"A", a__json=said)
    columns = ColumnNames(caption="name", language="tongue", id="key", group="concept")
    pair = open_pairs(file, columns=columns)[0]
    assert (pair.id, pair.group, pair.captions, pair.meta) == (
        "7",
        "dog",
        (Caption("mbwa", "sw"),),
        {"caption": "a dog"},
    )
    refused(file, "a.json has no column 'konzept'", "did you mean 'concept'?", group="konzept")
    bare = tar_of(tmp_path / "b.tar", a__jpg=b"A", a__txt="a dog")
    refused(bare, "a.jpg has no .json beside it, which should give concept", group="concept")


def test_repeated_ids_and_members(tmp_path: Path):
    said = {"caption": "x", "key": 7}
    file = tar_of(tmp_path / "a.tar", a__jpg=b"A", a__json=said, b__jpg=b"B", b__json=said)
    refused(file, "the id '7' is given twice", id="key")
    refused(tar_of(file, a__jpg=b"A", a__png=b"A", a__txt="x"), "'a.jpg' and 'a.png' claim one place")


@pytest.mark.parametrize(
    "members, wanted",
    [
        ({"a__json": '{"caption": '}, "a.json is not JSON"),
        ({"a__json": '["a dog"]'}, "a.json must hold an object"),
        ({"a__json": {"caption": 5}}, "a caption must be a text"),
        ({"a__txt": "Hündchen".encode("latin-1")}, "a.txt is not UTF-8"),
        ({"b__npy": b"x"}, "1 of 1 pairs have an empty caption or none"),
    ],
)
def test_samples_that_say_nothing_sensible(members: dict[str, object], wanted: str, tmp_path: Path):
    refused(tar_of(tmp_path / "a.tar", a__jpg=b"A", **members), wanted)  # pyright: ignore[reportArgumentType]


def test_a_tar_without_images(tmp_path: Path):
    refused(tar_of(tmp_path / "a.tar", a__txt="a", b__txt="b", b__npy=b"x"), "has no pairs", "found 2 .txt, 1 .npy")


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_is_refused_with_its_name_and_end(format: int, tmp_path: Path):
    long = "" if format == tarfile.USTAR_FORMAT else "é" * 90
    whole = write_tar(
        [toy._replace(key=toy.key + long) for toy in TOYS[:3]], tmp_path / "whole.tar", format
    ).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    cut = tmp_path / "cut.tar"
    for length in [0, 1, 511, *range(512, end, 128), end - 1, end, end + 511]:
        cut.write_bytes(whole[:length])
        refused(cut, "truncated", str(length))
    cut.write_bytes(whole[: end + 512])
    assert len(open_pairs(cut)) == 3


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path: Path):
    file = write_tar(TOYS, tmp_path / "a.tar", tarfile.USTAR_FORMAT)
    data = bytearray(file.read_bytes())
    second = 512 + -(-len(TOYS[0].png) // 512) * 512
    data[second : second + 512] = b"\xff" * 512
    file.write_bytes(data)
    refused(file, f"no whole header at byte {second}", f"after its member '{TOYS[0].key}.png'")


def test_a_tar_rewritten_in_place_while_it_is_open_is_named(tmp_path: Path):
    pairs = open_pairs(write_tar(TOYS, tmp_path / "a.tar"))
    pairs[0].image.read()
    other = write_tar(toys(6, seed=1), tmp_path / "b.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(other)  # of the same size: the offsets are those of other images
    with pytest.raises(UserError, match="was changed after it was opened"):
        pairs[0].image.read()


def test_what_is_no_tar_and_what_is_two(tmp_path: Path):
    none = tmp_path / "a.tar"
    none.write_bytes(gzip.compress(bytes(random.Random(0).randbytes(5000))))
    refused(none, "is not a tar")
    one, two = write_tar(TOYS[:3], tmp_path / "one.tar"), write_tar(TOYS[3:], tmp_path / "two.tar")
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    refused(both, "goes on behind its end mark", "a.tar::b.tar")


def test_a_tar_gz_is_unpacked_once_into_the_cache(tmp_path: Path):
    plain = write_tar(TOYS, tmp_path / "a.tar")
    packed, cache = tmp_path / "b.tar.gz", tmp_path / "cache"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pairs = open_pairs(packed, cache=cache)
    assert [pair.image.read() for pair in pairs] == [toy.png for toy in TOYS]
    assert pairs[0].image.name == f"{packed}::{TOYS[0].key}.png"
    (unpacked,) = cache.glob("unpacked-*.tar")
    written = unpacked.stat()
    assert open_pairs(packed, cache=cache).version == pairs.version == open_pairs(packed).version
    assert unpacked.stat() == written and len(list(cache.iterdir())) == 3  # the tar, its members, its samples


def test_an_index_in_a_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, cache = write_tar(TOYS, tmp_path / "a.tar"), tmp_path / "cache"
    before = list(open_pairs(file, cache=cache))
    monkeypatch.setattr(tarfile, "open", lambda *args: pytest.fail("the tar was walked again"))
    assert list(open_pairs(file, cache=cache)) == before
    with pytest.raises(pytest.fail.Exception):
        open_pairs(file)


def test_no_space_left_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(write_tar(TOYS, tmp_path / "a.tar").read_bytes()))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(UserError, match=r"no space left in .*cache to unpack .*a\.tar\.gz"):
        open_pairs(packed, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_cache, "_MAX_SMALL_UNPACKED_BYTES", 1 << 20)
    packed, cache = tmp_path / "a.csv.gz", tmp_path / "cache"
    packed.write_bytes(gzip.compress(bytes(3 << 20)))
    message = rf"{packed.stat().st_size:,} bytes and unpacks to more than 1,048,576; .*gunzip"
    with pytest.raises(UserError, match=message):
        open_pairs(packed, cache=cache)
    assert list(cache.iterdir()) == []
    packed.write_bytes(b"".join(gzip.compress(random.Random(seed).randbytes(1 << 19)) for seed in range(3)))
    with pytest.raises(UserError, match=r"a\.csv\.gz") as error:  # no captions, but unpacked: it is larger than that
        open_pairs(packed, cache=cache)
    assert "unpacks" not in str(error.value)


def test_toys_are_functions_of_their_seed():
    assert toys(4, seed=1) == toys(4, seed=1) != toys(4, seed=2)
    assert len({toy.caption for toy in toys(30)}) == 30 and isinstance(toys(1)[0], Toy)
    assert io.BytesIO(toys(1)[0].png).read(4) == b"\x89PNG"
