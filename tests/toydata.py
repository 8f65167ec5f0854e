"""A toy world drawn with Pillow: coloured shapes with captions such as "a red circle", in every form pairs come in.

Goes in: how many, a seed, where to. Comes out: ``Toy``s, and files or folders that all hold the same pairs.
Unusual: everything is a function of the seed, so two calls write the same bytes; neighbours differ in shape and colour.
"""

import csv
import io
import json
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")


class Toy(NamedTuple):
    """One drawing: its file name without suffix, its bytes (PNG), what it shows."""

    key: str
    png: bytes
    shape: str
    colour: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape}"


def draw(shape: str, colour: str, seed: int = 0, size: int = 32) -> Image.Image:
    """The shape in its colour, somewhere on a light ground; place, extent and ground depend on the seed."""
    chance = random.Random(f"{shape} {colour} {seed}")
    ground = tuple(chance.randint(225, 255) for _ in range(3))
    radius = size * chance.uniform(0.22, 0.34)
    x, y = (chance.uniform(radius + 1, size - radius - 1) for _ in range(2))
    image = Image.new("RGB", (size, size), ground)
    pen, paint = ImageDraw.Draw(image), COLOURS[colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    thin = radius / 3
    if shape == "circle":
        pen.ellipse(box, fill=paint)
    elif shape == "square":
        pen.rectangle(box, fill=paint)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=paint)
    elif shape == "cross":
        pen.rectangle((x - thin, y - radius, x + thin, y + radius), fill=paint)
        pen.rectangle((x - radius, y - thin, x + radius, y + thin), fill=paint)
    elif shape == "ring":
        pen.ellipse(box, outline=paint, width=max(2, round(thin)))
    else:
        raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    return image


def toys(count: int, *, seed: int = 0, size: int = 32) -> list[Toy]:
    """``count`` drawings; the first 30 are all combinations of shape and colour, and so on round."""
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    random.Random(seed).shuffle(kinds)
    made = []
    for number in range(count):
        shape, colour = kinds[number % len(kinds)]
        file = io.BytesIO()
        draw(shape, colour, seed * 1_000_003 + number, size).save(file, "PNG")
        made.append(Toy(f"{colour}-{shape}-{number:04}", file.getvalue(), shape, colour))
    return made


# --- the same pairs in every form; each returns what is to be given to open_pairs -------------------------------------


def write_images(toys: Sequence[Toy], folder: Path) -> Path:
    """``folder/images/KEY.png``; the tables below point there."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for toy in toys:
        (images / f"{toy.key}.png").write_bytes(toy.png)
    return images


def write_folder(toys: Sequence[Toy], folder: Path) -> Path:
    """``KEY.png`` and ``KEY.txt`` side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    for toy in toys:
        (folder / f"{toy.key}.png").write_bytes(toy.png)
        (folder / f"{toy.key}.txt").write_text(toy.caption + "\n", "utf-8")
    return folder


def write_classes(toys: Sequence[Toy], folder: Path) -> Path:
    """``a_red-circle/KEY.png``: class folders whose names read as the captions."""
    for toy in toys:
        home = folder / f"a_{toy.colour}-{toy.shape}"
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{toy.key}.png").write_bytes(toy.png)
    return folder


def write_csv(toys: Sequence[Toy], folder: Path) -> Path:
    return _write_cells(toys, folder, "pairs.csv", ",")


def write_tsv(toys: Sequence[Toy], folder: Path) -> Path:
    return _write_cells(toys, folder, "pairs.tsv", "\t")


def write_jsonl(toys: Sequence[Toy], folder: Path) -> Path:
    write_images(toys, folder)
    rows = [{"image": f"images/{toy.key}.png", "caption": toy.caption} for toy in toys]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def write_lilt(toys: Sequence[Toy], folder: Path) -> Path:
    """LilT's list: absolute paths, and ``image_id`` as the group."""
    images = write_images(toys, folder).absolute()
    rows = [{"image": str(images / f"{toy.key}.png"), "image_id": toy.key, "caption": toy.caption} for toy in toys]
    file = folder / "pairs.json"
    file.write_text(json.dumps(rows), "utf-8")
    return file


def write_parquet(
    toys: Sequence[Toy], folder: Path, images: Literal["path", "bytes", "struct"] = "path", group_rows: int = 5
) -> Path:
    """Images as paths, as bytes, or as Hugging Face's {bytes, path}; row groups of ``group_rows``."""
    write_images(toys, folder)
    paths = [f"images/{toy.key}.png" for toy in toys]
    cells = {
        "path": paths,
        "bytes": [toy.png for toy in toys],
        "struct": [{"bytes": toy.png, "path": path} for toy, path in zip(toys, paths, strict=True)],
    }
    file = folder / f"pairs-{images}.parquet"
    table = pa.table({"image": cells[images], "caption": [toy.caption for toy in toys]})
    pq.write_table(table, file, row_group_size=group_rows)
    return file


def write_tar(toys: Sequence[Toy], file: Path, format: int = tarfile.PAX_FORMAT) -> Path:
    """A webdataset shard: KEY.png, KEY.txt."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=format) as tar:
        for toy in toys:
            add_member(tar, f"{toy.key}.png", toy.png)
            add_member(tar, f"{toy.key}.txt", toy.caption.encode())
    return file


def write_shards(toys: Sequence[Toy], folder: Path, shards: int = 3) -> str:
    """Several tars, in order; returns ``FOLDER/shard-{000..002}.tar``."""
    each = -(-len(toys) // shards)
    for number in range(shards):
        write_tar(toys[number * each : (number + 1) * each], folder / f"shard-{number:03}.tar")
    return str(folder / f"shard-{{000..{shards - 1:03}}}.tar")


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_cells(toys: Sequence[Toy], folder: Path, name: str, delimiter: str) -> Path:
    write_images(toys, folder)
    file = folder / name
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter=delimiter)
        writer.writerow(["filepath", "title"])
        writer.writerows([f"images/{toy.key}.png", toy.caption] for toy in toys)
    return file


WRITERS: dict[str, Callable[[Sequence[Toy], Path], Path | str]] = {
    "folder": write_folder,
    "classes": write_classes,
    "csv": write_csv,
    "tsv": write_tsv,
    "jsonl": write_jsonl,
    "lilt": write_lilt,
    "parquet": write_parquet,
    "parquet bytes": lambda toys, folder: write_parquet(toys, folder, "bytes"),
    "parquet struct": lambda toys, folder: write_parquet(toys, folder, "struct"),
    "tar": lambda toys, folder: write_tar(toys, folder / "pairs.tar"),
    "shards": write_shards,
}
