"""Folders of webdataset shards, as CLIP_benchmark exports data sets: ``FOLDER/test/0.tar``, with files about them.

Input: a folder. Output: its shards, and what stands beside or above them: ``classnames.txt``, and ``dataset_type.txt``,
which says ``retrieval`` where each line of a ``.txt`` is a caption. Note: the split of a data set is ``test``; another
is named as a folder itself, ``FOLDER/train``.
"""

import re
from pathlib import Path

from clasp.plain_types import UserError

CLASS_NAMES_FILE = "classnames.txt"
_TYPE_FILE, _SHARDS_FILE, _SPLIT = "dataset_type.txt", "nshards.txt", "test"
_ABOUT_SUFFIXES = (".txt", ".json", ".md")
_SPLITS = (_SPLIT, "train", "val", "validation", "valid")


def expand_shard_folder(path: Path) -> list[Path]:
    """The shards of a folder, by number; the path itself where it is no folder of shards.

    Raises ``UserError`` where ``nshards.txt`` names shards that are not there.
    """
    if not path.is_dir():
        return [path]
    described = any((path / name).is_file() for name in (CLASS_NAMES_FILE, _TYPE_FILE))
    folder = path / _SPLIT if described and (path / _SPLIT).is_dir() and not _shards(path) else path
    shards = _shards(folder)
    counted = folder / _SHARDS_FILE
    if counted.is_file():
        text = counted.read_text(encoding="utf-8").strip()
        missing = [f"{number}.tar" for number in range(int(text))] if text.isdecimal() else []
        missing = [name for name in missing if folder / name not in shards]
        if missing or not text.isdecimal():
            what = f"{missing[0]} is missing" if missing else "it must hold a number"
            raise UserError(f"{counted} says {text!r} shards: {what}")
    return shards or [path]


def _shards(folder: Path) -> list[Path]:
    """The tars of a folder that has nothing else but files about them; in another, a tar is not part of the data."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if any(entry.is_dir() or entry.suffix not in (".tar", *_ABOUT_SUFFIXES) for entry in entries):
        return []
    tars = [entry for entry in entries if entry.suffix == ".tar"]
    return sorted(tars, key=lambda file: [int(part) if part.isdecimal() else part for part in _parts(file.name)])


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def read_class_folder_names(path: Path) -> tuple[str, ...]:
    """The lines of the ``classnames.txt`` beside a shard, or in a folder, or above; empty where there is none."""
    for folder in _near(path):
        if (folder / CLASS_NAMES_FILE).is_file():
            text = (folder / CLASS_NAMES_FILE).read_text("utf-8-sig").rstrip()
            return tuple(line.strip() for line in text.split("\n")) if text else ()
    return ()


def captions_by_line(path: Path) -> bool:
    """Whether the data set of a shard is one for retrieval, whose ``.txt`` has a caption on each line."""
    named = next((folder / _TYPE_FILE for folder in _near(path) if (folder / _TYPE_FILE).is_file()), None)
    return named is not None and named.read_text("utf-8").strip() == "retrieval"


def _near(path: Path) -> tuple[Path, ...]:
    """The folder of a shard or of class folders, and the one above a split."""
    folder = (path if path.is_dir() else path.parent).absolute()
    return (folder, folder.parent) if folder.name in _SPLITS else (folder,)
