"""Inputs of the data readers: tables, tars, compressed files, folders, saved indices of pairs, images.

Output: ``PAIR_READERS``. A source is opened, all its pairs are looked at, and three of its images are read and decoded;
an image that cannot be read is a bad sample, as in training.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from clasp.data.file_fields import read_file_fields
from clasp.data.image_header import read_image_header
from clasp.data.images import ImageError, ImageTransform
from clasp.data.pairs import Pairs, list_images, open_pairs
from clasp.types import UserError
from faults.fuzz.mutations import TOKENS, mutate
from faults.fuzz.worker import BAD_SAMPLE, VALUE, Reader
from toydata import WRITERS, draw, toys, write_folder, write_images, write_tar

_TRANSFORM = ImageTransform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_MAX_PIXELS = 1 << 26
_READ_IMAGES = 3
_TOKENS = (b'"image"', b'"caption"', b"filepath", b"title", b"images/", b".png", b'"group"', b"language", b"__key__")
_Read = Callable[[random.Random, Path], str]


def _seeds(format: str, folder: Path) -> list[bytes]:
    """Files of a format, of one, five and twenty pairs."""
    found = []
    for count in (1, 5, 20):
        home = folder / f"{format}-{count}"
        made = Path(WRITERS[format](toys(count), home)).read_bytes()
        found.append(made.replace(f"{home.absolute()}/".encode(), b""))  # absolute paths would be refused
    return found


def _look_at(pairs: Pairs) -> str:
    """What a run does with pairs before its first step."""
    outcome = VALUE
    for number, pair in enumerate(pairs):
        assert pair.id and pair.captions is not None
        if number < _READ_IMAGES:
            try:
                _TRANSFORM(pair.image.read())
            except (ImageError, UserError, OSError):  # what the readers of batches skip and count
                outcome = BAD_SAMPLE
    return outcome


def _open_table(folder: Path, format: str, suffix: str) -> _Read:
    seeds, drawings = _seeds(format, folder), write_images(toys(20), folder)

    def read(chance: random.Random, scratch: Path) -> str:
        file = scratch / f"pairs{suffix}"
        file.write_bytes(mutate(chance.choice(seeds), chance, seeds, _TOKENS))
        (scratch / "images").symlink_to(drawings)
        return _look_at(open_pairs(file, cache=scratch / "cache"))

    return read


def _open_gzip(folder: Path) -> _Read:
    kinds = {".csv": _seeds("csv", folder), ".jsonl": _seeds("jsonl", folder), ".tar": _seeds("tar", folder)}

    def read(chance: random.Random, scratch: Path) -> str:
        suffix = chance.choice(list(kinds))
        plain = chance.choice(kinds[suffix])
        if chance.random() < 0.3:
            plain = mutate(plain, chance, kinds[suffix])
        packed = gzip.compress(plain, 1, mtime=0)
        file = scratch / f"pairs{suffix}.gz"
        file.write_bytes(mutate(packed, chance, [packed]))
        return _look_at(open_pairs(file, cache=scratch / "cache"))

    return read


def _open_tar(folder: Path) -> _Read:
    seeds = _seeds("tar", folder)
    for format in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        seeds.append(write_tar(toys(5), folder / f"{format}.tar", format).read_bytes())

    def read(chance: random.Random, scratch: Path) -> str:
        data = chance.choice(seeds)
        whole = mutate(data, chance, seeds, _TOKENS)
        if chance.random() < 0.5:  # with the checksum of the header mended, else most are refused for it
            whole = _with_checksums(whole)
        file = scratch / "pairs.tar"
        file.write_bytes(whole)
        return _look_at(open_pairs(file, cache=scratch / "cache"))

    return read


def _with_checksums(data: bytes) -> bytes:
    """A tar whose first headers have the checksum of their bytes."""
    whole = bytearray(data)
    for start in range(0, min(len(whole) - 511, 40 * 512), 512):
        header = whole[start : start + 512]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            whole[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    return bytes(whole)


def _open_index(folder: Path) -> _Read:
    """A saved index of pairs beside a whole table."""
    write_folder(toys(5), folder / "pairs")
    cache = folder / "cache"
    open_pairs(folder / "pairs", cache=cache)
    (index,) = cache.glob("index-*.arrow")
    seed, wanted = index.read_bytes(), [pair.id for pair in open_pairs(folder / "pairs")]

    def read(chance: random.Random, scratch: Path) -> str:
        index.write_bytes(mutate(seed, chance, [seed]))
        pairs = open_pairs(folder / "pairs", cache=cache)
        assert [pair.id for pair in pairs] == wanted, "a damaged index gives other pairs"
        return _look_at(pairs)

    return read


def _open_folder(folder: Path) -> _Read:
    captions = [toy.caption.encode() for toy in toys(6)]

    def read(chance: random.Random, scratch: Path) -> str:
        home = write_folder(toys(6, seed=chance.randrange(5)), scratch / "pairs")
        for _ in range(chance.randint(1, 4)):
            _disturb(home, chance, captions)
        if chance.random() < 0.3:
            for name, source in list_images(home):
                _bad_or_good(name, source.read)
        return _look_at(open_pairs(home, cache=scratch / "cache"))

    return read


def _bad_or_good(name: str, read: Callable[[], bytes]) -> None:
    try:
        _TRANSFORM(read())
    except (ImageError, UserError, OSError):
        assert name


def _disturb(home: Path, chance: random.Random, captions: Sequence[bytes]) -> None:
    """One change of a folder: a file that is odd, gone, renamed, or of another kind."""
    files = sorted(home.rglob("*"))
    file = chance.choice(files) if files else home / "new.txt"
    name = os.fsencode(home) + b"/" + chance.choice(TOKENS).replace(b"/", b"_").replace(b"\0", b"")[:200]
    name += chance.choice((b"", b".png", b".txt", b".json", b".JPG", b".heic", b".tar.gz"))
    kind = chance.randrange(8)
    try:
        if kind == 0:
            file.unlink()
        elif kind == 1:
            os.rename(file, name)
        elif kind == 2:
            os.mkfifo(name + b".png")
        elif kind == 3:
            os.symlink(chance.choice((b"/dev/zero", b".", b"nowhere", b"/etc/passwd", b"..")), name + b".jpg")
        elif kind == 4:
            os.mkdir(name)
        elif kind == 5:
            Path(os.fsdecode(name)).write_bytes(mutate(chance.choice(captions), chance, captions))
        elif file.is_file():
            file.write_bytes(mutate(file.read_bytes(), chance, captions))
    except OSError:
        return


def _decode(folder: Path) -> _Read:
    seeds = _encoded()

    def read(chance: random.Random, scratch: Path) -> str:
        data = mutate(chance.choice(seeds), chance, seeds)
        read_file_fields(data)  # of a bad image too: it is read before decoding
        read_image_header(data, _MAX_PIXELS)
        _TRANSFORM(data)
        return VALUE

    return read


def _encoded() -> list[bytes]:
    """A drawing in every format, mode and orientation that a few bytes can have."""
    found, picture = [], draw("ring", "red", size=24)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = 6, "Leica", "2020:01:02 03:04:05"
    for format, options in {
        "PNG": {"exif": exif},
        "JPEG": {"exif": exif},
        "WEBP": {"exif": exif},
        "TIFF": {"compression": "tiff_lzw"},
        "GIF": {},
        "BMP": {},
        "PPM": {},
        "JPEG2000": {},
        "AVIF": {},
    }.items():
        for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK", "I;16", "F"):
            file = io.BytesIO()
            try:
                picture.convert("L" if mode == "I;16" else mode).convert(mode).save(file, format, **options)
            except (OSError, ValueError, KeyError):  # no such mode in this format, or no such encoder
                continue
            found.append(file.getvalue())
    return found


PAIR_READERS: tuple[Reader, ...] = (
    Reader("csv", 10_000, partial(_open_table, format="csv", suffix=".csv")),
    Reader("tsv", 4_000, partial(_open_table, format="tsv", suffix=".tsv")),
    Reader("json", 8_000, partial(_open_table, format="lilt", suffix=".json")),
    Reader("jsonl", 10_000, partial(_open_table, format="jsonl", suffix=".jsonl")),
    Reader("parquet", 6_000, partial(_open_table, format="parquet", suffix=".parquet")),
    Reader("parquet with images", 4_000, partial(_open_table, format="parquet struct", suffix=".parquet")),
    Reader("tar", 9_000, _open_tar),
    Reader("gz", 4_000, _open_gzip),
    Reader("folder", 4_000, _open_folder),
    Reader("index of pairs", 2_000, _open_index),
    Reader("image", 14_000, _decode),
)
