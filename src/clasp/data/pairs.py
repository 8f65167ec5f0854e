"""Image-caption data sets on disk, opened as map-style sequences of pairs.

Input: a source (a folder, a data set in a published layout, .csv, .tsv, .jsonl, .parquet, LilT's .json, webdataset
tars; several joined by ``::``).
Output: ``Pairs`` (``clasp.data.pair_sequence``): random access, stable ids, cheap to pickle for workers. The
formats are registered in ``PAIR_FORMATS``. Note: opening a source checks all captions and no image; an image is read
when its source is. Tars are read through an index of offsets, so the order is exact and shuffling is global. Files that
belong to no pair are counted by reason in ``Pairs.skipped_files``.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from clasp.data.formats.base import OpenedSource, PairFormat, SourceSpec
from clasp.data.formats.elevater import open_elevater_list
from clasp.data.formats.folders import FolderFiles, open_folder, split_file_name
from clasp.data.formats.index_cache import unpack_gzip
from clasp.data.formats.parquet import ParquetSource, open_parquet
from clasp.data.formats.remote_tar import TAR_FORMAT, nominal_path, open_remote_tar
from clasp.data.formats.rows import DEFAULT_COLUMNS, ColumnNames
from clasp.data.formats.samples import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    count_suffixes,
    is_unread_image,
    open_webdataset,
)
from clasp.data.formats.setting_hints import PYTHON_HINTS, SettingHints
from clasp.data.formats.shard_folders import expand_shard_folder
from clasp.data.formats.skipped_files import ReportsSkipped, SkippedFiles
from clasp.data.formats.sources import FileSource, TarSource, names_address, require_no_address
from clasp.data.formats.tables import open_table
from clasp.data.formats.text_rows import DelimitedRows, JsonLines, JsonList
from clasp.data.pair_sequence import Pairs, caption_languages, split_by_group
from clasp.data.plugins import load_named
from clasp.data.shard_stage import ShardStage
from clasp.plain_types import ImageSource, UserError

__all__ = [
    "ColumnNames",
    "FileSource",
    "FolderImages",
    "Pairs",
    "ParquetSource",
    "TarSource",
    "caption_languages",
    "list_images",
    "open_pairs",
    "split_by_group",
]

_FOLDER = "folder"
PAIR_FORMATS: dict[str, PairFormat] = {
    _FOLDER: open_folder,
    ".csv": partial(open_table, row_format=partial(DelimitedRows.of, delimiter=",")),
    ".tsv": partial(open_table, row_format=partial(DelimitedRows.of, delimiter="\t")),
    ".jsonl": partial(open_table, row_format=JsonLines.of),
    ".json": partial(open_table, row_format=JsonList.of),
    ".parquet": open_parquet,
    ".tar": open_webdataset,
    ".txt": open_elevater_list,
}
"""``folder`` or file suffix (before ``.gz``) -> the function that opens it"""


def find_pair_format(name: str) -> PairFormat:
    """The entry of ``PAIR_FORMATS``, or the function ``package.module:Name``. Raises ``UserError`` if unknown."""
    return load_named(name, PAIR_FORMATS, "data.format")


def describe_pair_formats() -> str:
    """The supported formats, for error messages and help texts."""
    return f"a folder, or {', '.join(name for name in PAIR_FORMATS if name != _FOLDER)} (or one of these .gz)"


_MAX_SOURCES = 1_000_000  # that one pair of braces may stand for


def open_pairs(
    source: str | Path,
    *,
    format: str | None = None,
    columns: ColumnNames = DEFAULT_COLUMNS,
    image_root: str | Path | None = None,
    cache: Path | None = None,
    stage: ShardStage | None = None,
    hints: SettingHints = PYTHON_HINTS,
) -> Pairs:
    """Open a source and check every caption; ``UserError`` in one line for any problem.

    ``source`` may be several, ``a.tar::b.csv`` or ``shards-{000..012}.tar``; files of any format may be ``.gz``.
    ``format`` is the format of all of them (see ``find_pair_format``); by default it is inferred from the file suffix.
    ``image_root`` is the folder that image paths in tables are relative to; by default the folder of the table, which
    they must then not lead out of.
    With a ``stage``, tars may be at addresses (``s3://…/{0000..0999}.tar``); without, an address is an error.
    With a ``cache`` folder, indexing and unpacking of ``.gz`` are done once for a file of this path, size and time.
    An id is the value of the id column, else the image path or the tar member's key; if ids of several sources collide,
    each is prefixed with its source (``a.tar::key``).
    ``hints``: the words in which an error names ``columns`` and ``image_root``.
    """
    names = expand_source(str(source))
    if stage is not None and all(map(names_address, names)):
        with hints.added():
            return _open_shards(str(source), names, format, columns, cache, stage)
    paths = existing_paths(source)
    formats = [format or _format_of(path) for path in paths]
    if format in (None, _FOLDER, TAR_FORMAT):
        shards = [expand_shard_folder(path) for path in paths]
        formats = [
            name if shard == path else TAR_FORMAT
            for path, name, some in zip(paths, formats, shards, strict=True)
            for shard in some
        ]
        paths = [shard for some in shards for shard in some]
    with hints.added():
        opened = [_open(path, name, columns, image_root, cache) for path, name in zip(paths, formats, strict=True)]
    parts = _with_unique_ids(paths, opened)
    skipped = sum((part.skipped_files for part in parts if isinstance(part, ReportsSkipped)), SkippedFiles())
    origins = [os.path.realpath(path) for path in paths]
    return Pairs(str(source), parts, skipped_files=skipped, origins=origins, cache=cache)


def existing_paths(source: str | Path) -> list[Path]:
    """The folders and files that a source stands for. Raises ``UserError`` where one is not there."""
    names = expand_source(str(source))
    paths = [Path(os.path.expanduser(name)) for name in names]
    for name, path in zip(names, paths, strict=True):
        if not name:
            raise UserError(f"{str(source)!r} names no source; name a folder or a file")
        require_no_address(name, "pairs")
        if not path.exists():
            raise UserError(_missing(path, paths))
    return paths


def _open_shards(
    source: str,
    addresses: list[str],
    format: str | None,
    columns: ColumnNames,
    cache: Path | None,
    stage: ShardStage,
) -> Pairs:
    """Open tars at addresses, in order; each is fetched once to be indexed."""
    for address in addresses:
        if (format or Path(urlsplit(address).path).suffix.lower()) != TAR_FORMAT:
            raise UserError(f"{address} is an address, and only {TAR_FORMAT} shards are read from one; download it")
    shards = stage.describe(addresses)
    opened = [
        open_remote_tar(shard, following, columns, cache)
        for shard, following in zip(shards, [*shards[1:], None], strict=True)
    ]
    parts = _with_unique_ids([nominal_path(address) for address in addresses], list(opened))
    skipped = sum((part.skipped_files for part in opened), SkippedFiles())
    return Pairs(source, parts, skipped_files=skipped, origins=addresses, cache=cache)


def _format_of(path: Path) -> str:
    name = _FOLDER if path.is_dir() else path.with_name(path.name.removesuffix(".gz")).suffix.lower()
    if name not in PAIR_FORMATS:
        raise UserError(f"{path} is not of a kind that clasp can open: {describe_pair_formats()}")
    return name


def _open(
    path: Path, format: str, columns: ColumnNames, image_root: str | Path | None, cache: Path | None
) -> OpenedSource:
    root = os.path.abspath(os.path.expanduser(image_root or path.parent))
    open_source = find_pair_format(format)
    try:
        file = unpack_gzip(path, cache) if path.suffix == ".gz" and path.is_file() else path
        opened = open_source(SourceSpec(path, file, columns, root, cache, format, leaves_root=image_root is not None))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a text in it or beside it is not UTF-8: {error}") from None
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be opened: {error.strerror or error}") from None
    if not isinstance(opened, OpenedSource):
        raise UserError(f"data.format = {format!r} gave a {type(opened).__name__}; it must give an OpenedSource")
    return opened


def _missing(path: Path, paths: list[Path]) -> str:
    missing = [other for other in paths if not other.exists()]
    more = f" (nor do {len(missing) - 1} more of the {len(paths)} sources)" if len(missing) > 1 else ""
    parent = path.parent
    if path.is_symlink():
        return f"{path} is a link to {os.readlink(path)}, which does not exist{more}"
    if not parent.is_dir():
        return f"{path} does not exist{more}; neither does its folder {parent}"
    near = difflib.get_close_matches(path.name, os.listdir(parent), n=1)
    return f"{path} does not exist{more}" + (f"; did you mean {near[0]}?" if near else "")


def _with_unique_ids(paths: list[Path], parts: list[OpenedSource]) -> list[OpenedSource]:
    """Prefix the ids and groups of several sources where they would otherwise collide."""
    if len(parts) == 1:
        return parts
    whole = [str(path.absolute()) for path in paths]
    names = _relative_paths(os.path.commonpath([os.path.dirname(path) for path in whole]), whole)
    roots = _relative_paths(os.path.commonpath([part.root for part in parts]), [part.root for part in parts])
    hashes, counts = np.unique(np.concatenate([part.hashes for part in parts]), return_counts=True)
    repeated = hashes[counts > 1]
    id_prefixes = [f"{name}::" if len(repeated) else "" for name in names]
    path_prefixes = ["" if root == "." else f"{root}/" for root in roots]
    parts = [part.prefixed(*of) for part, *of in zip(parts, id_prefixes, path_prefixes, strict=True)]
    owner: dict[str, str] = {}
    for name, part in zip(names, parts, strict=True):
        for row in np.flatnonzero(np.isin(part.hashes, repeated)):
            id = part[int(row)].id
            if id in owner:
                raise UserError(f"the id {id!r} is given twice, in {owner[id]} and in {name}")
            owner[id] = name
    return parts


def _relative_paths(folder: str, paths: list[str]) -> list[str]:
    return [Path(os.path.relpath(path, folder)).as_posix() for path in paths]


def has_columns(source: str) -> bool:
    """Whether a source, as it was given, may have columns to name: folders and tars have none."""
    paths = [Path(os.path.expanduser(name)) for name in expand_source(source)]
    return not any(path.is_dir() or path.name.removesuffix(".gz").endswith(TAR_FORMAT) for path in paths)


def expand_source(source: str) -> list[str]:
    """Expand ``a::b``, ``x-{000..012}.tar`` and ``{train,val}.csv`` to a list, in order."""
    if "::" in source:
        return [name for part in source.split("::") for name in expand_source(part)]
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", source)
    if braces is None:
        return [source]
    first, last, names = braces.groups()
    if names is not None:
        choices = names.split(",")
    else:
        if int(last) - int(first) >= _MAX_SOURCES:
            raise UserError(f"{source}: {braces.group()} stands for more than {_MAX_SOURCES:,} sources")
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        if not choices:
            raise UserError(f"{source}: {braces.group()} counts down; the first number must not be above the last")
    before, after = source[: braces.start()], source[braces.end() :]
    return [name for choice in choices for name in expand_source(before + choice + after)]


@dataclass(frozen=True)
class FolderImages(Sequence[tuple[str, ImageSource]]):
    """The images of a folder: id (the path relative to the folder) and source."""

    origin: str
    """The path of the folder, links resolved."""
    images: tuple[tuple[str, ImageSource], ...]
    skipped_files: SkippedFiles

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[str, ImageSource]]:
        return iter(self.images)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]


def list_images(path: str | Path) -> FolderImages:
    """The images of a folder, recursively; other files, except captions, are counted by reason."""
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        raise UserError(f"{path} is not a folder" if path.exists() else _missing(path, [path]))
    folder = FolderFiles.of(path)
    rows, others = [], []
    for row, name in enumerate(folder.names):
        suffix = split_file_name(name)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            rows.append(row)
        elif is_unread_image(name):
            others.append((f"image of a format that is not read (.{suffix})", name))
        elif suffix not in CAPTION_SUFFIXES:
            others.append((f"file that is not an image ({f'.{suffix}' if suffix else 'no suffix'})", name))
    skipped = folder.skipped_files + SkippedFiles.of(others)
    if not rows:
        found = f"found {count_suffixes(folder.names)}{f'; {skipped}' if skipped else ''}"
        raise UserError(f"{path} has no images: looked for .{', .'.join(IMAGE_SUFFIXES)}; {found}")
    return FolderImages(os.path.realpath(path), tuple((folder.names[row], folder.source(row)) for row in rows), skipped)


def skipped_lines(*opened: Pairs) -> list[str]:
    """A line for each source with skipped files: how many, by reason."""
    return [
        f"{name}: {skipped}"
        for name, skipped in {pairs.name: pairs.skipped_files for pairs in opened}.items()
        if skipped
    ]
