"""Image-caption data sets on disk, as map-style sequences of pairs.

Input: a source (a folder, .csv, .tsv, .jsonl, .parquet, LilT's .json, webdataset tars; several joined by ``::``).
Output: ``Pairs``, a sequence of ``Pair``: random access, constant memory, stable ids, cheap to pickle for workers. The
formats are registered in ``PAIR_FORMATS``. Note: opening a source checks all captions and no image; an image is read
when its source is. Tars are read through an index of offsets, so the order is exact and shuffling is global. Files that
belong to no pair are counted by reason in ``Pairs.skipped_files``.
"""

import difflib
import hashlib
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, overload, runtime_checkable

import numpy as np

from clasp.data.formats.base import OpenedSource, PairFormat, SourceSpec
from clasp.data.formats.folders import FolderFiles, open_folder, split_file_name
from clasp.data.formats.index_cache import unpack_gzip
from clasp.data.formats.parquet import ParquetSource, open_parquet
from clasp.data.formats.rows import DEFAULT_COLUMNS, ColumnNames
from clasp.data.formats.samples import IMAGE_SUFFIXES, count_suffixes, is_unread_image, open_webdataset
from clasp.data.formats.skipped_files import ReportsSkipped, SkippedFiles
from clasp.data.formats.sources import FileSource, TarSource, require_no_address
from clasp.data.formats.tables import open_table
from clasp.data.formats.text_rows import DelimitedRows, JsonLines, JsonList
from clasp.data.plugins import load_named
from clasp.plain_types import ImageSource, Pair, UserError

__all__ = [
    "ColumnNames",
    "FileSource",
    "FolderImages",
    "Pairs",
    "ParquetSource",
    "TarSource",
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
}
"""``folder`` or file suffix (before ``.gz``) -> the function that opens it"""


def find_pair_format(name: str) -> PairFormat:
    """The entry of ``PAIR_FORMATS``, or the function ``package.module:Name``. Raises ``UserError`` if unknown."""
    return load_named(name, PAIR_FORMATS, "data.format")


def describe_pair_formats() -> str:
    """The supported formats, for error messages and help texts."""
    return f"a folder, or {', '.join(name for name in PAIR_FORMATS if name != _FOLDER)} (or one of these .gz)"


_MAX_SOURCES = 1_000_000  # that one pair of braces may stand for
_CAPTION_SUFFIXES = ("txt", "json", "cls")  # not reported when only images are listed


@runtime_checkable
class _PairSequence(Protocol):
    """What ``Pairs`` needs of a part; a list of ``Pair`` qualifies."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Pair: ...


class Pairs(Sequence[Pair]):
    """The concatenated pairs of one or several parts.

    ``name`` is the source as the user gave it. A part is an opened file or a list of ``Pair``; ``rows`` selects from
    the concatenation, in that order (default: all). A slice is again a ``Pairs``.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[_PairSequence],
        rows: np.ndarray | None = None,
        *,
        skipped_files: SkippedFiles | None = None,
        origins: Sequence[str] = (),
    ):
        assert len(origins) in (0, len(parts)), f"{len(origins)} origins of {len(parts)} parts"
        self.name = name
        self.skipped_files = skipped_files or SkippedFiles()
        """Files skipped when the source was opened."""
        self.origins = tuple(origins)
        """The path of each part, if these are all pairs of a source; empty for a subset."""
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self._parts])
        self._rows = np.arange(self._ends[-1]) if rows is None else rows

    def __repr__(self) -> str:
        return f"Pairs({self.name!r}, {len(self)} pairs)"

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Pair]:
        # the default of Sequence would take an IndexError inside a part for the end
        return (self[number] for number in range(len(self)))

    @overload
    def __getitem__(self, index: SupportsIndex) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> "Pairs": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "Pair | Pairs":
        if isinstance(index, slice):
            return Pairs(self.name, self._parts, self._rows[index], skipped_files=self.skipped_files)
        row = int(self._rows[operator.index(index)])
        part = self._part(row)
        return self._parts[part][row - (int(self._ends[part - 1]) if part else 0)]

    def _part(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def origin(self, index: int) -> str:
        """The path of the part that a pair comes from; needs ``origins``."""
        return self.origins[self._part(int(self._rows[index]))]

    def subset(self, indices: Iterable[SupportsIndex]) -> "Pairs":
        """The pairs at these indices, in this order."""
        chosen = np.fromiter((operator.index(index) for index in indices), np.int64)
        return Pairs(self.name, self._parts, self._rows[chosen], skipped_files=self.skipped_files)

    @cached_property
    def version(self) -> str:
        """sha256 over ids and image versions, in order: a cache key for what is computed from the images.

        Reads no image, but the size and modification time of every image file.
        """
        digest = hashlib.sha256()
        for pair in self:
            digest.update(f"{pair.id}\0{pair.image.version}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def open_pairs(
    source: str | Path,
    *,
    format: str | None = None,
    columns: ColumnNames = DEFAULT_COLUMNS,
    image_root: str | Path | None = None,
    cache: Path | None = None,
) -> Pairs:
    """Open a source and check every caption; ``UserError`` in one line for any problem.

    ``source`` may be several, ``a.tar::b.csv`` or ``shards-{000..012}.tar``; files of any format may be ``.gz``.
    ``format`` is the format of all of them (see ``find_pair_format``); by default it is inferred from the file suffix.
    ``image_root`` is the folder that image paths in tables are relative to; by default the folder of the table, which
    they must then not lead out of.
    With a ``cache`` folder, indexing and unpacking of ``.gz`` are done once for a file of this path, size and time.
    An id is the value of the id column, else the image path or the tar member's key; if ids of several sources collide,
    each is prefixed with its source (``a.tar::key``).
    """
    names = expand_source(str(source))
    paths = [Path(name).expanduser() for name in names]
    for name, path in zip(names, paths, strict=True):
        if not name:
            raise UserError(f"{str(source)!r} names no source; name a folder or a file")
        require_no_address(name, "pairs")
        if not path.exists():
            raise UserError(_missing(path, paths))
    names = [format or _format_of(path) for path in paths]
    opened = [_open(path, name, columns, image_root, cache) for path, name in zip(paths, names, strict=True)]
    parts = _with_unique_ids(paths, opened)
    skipped = sum((part.skipped_files for part in parts if isinstance(part, ReportsSkipped)), SkippedFiles())
    return Pairs(str(source), parts, skipped_files=skipped, origins=[os.path.realpath(path) for path in paths])


def _format_of(path: Path) -> str:
    name = _FOLDER if path.is_dir() else path.with_name(path.name.removesuffix(".gz")).suffix.lower()
    if name not in PAIR_FORMATS:
        raise UserError(f"{path} is of no kind clasp can open: {describe_pair_formats()}")
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
        raise UserError(f"{path} cannot be opened: {error.strerror or error}") from None
    if not isinstance(opened, OpenedSource):
        raise UserError(f"data.format = {format!r} gave a {type(opened).__name__}; it must give an OpenedSource")
    return opened


def _missing(path: Path, paths: list[Path]) -> str:
    missing = [other for other in paths if not other.exists()]
    more = f" (nor do {len(missing) - 1} more of the {len(paths)} sources)" if len(missing) > 1 else ""
    parent = path.parent
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


def split_by_group(pairs: Pairs, fraction: float, *, salt: str = "clasp") -> tuple[Pairs, Pairs]:
    """Split into training and validation pairs: about ``fraction`` of the groups are held out, by a hash of the group.

    A group is never on both sides, and does not change sides when pairs are added or removed. Neither side is empty.
    ``UserError`` for a ``fraction`` outside (0, 1), and when there is only one group.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the fraction for validation must lie between 0 and 1, not {fraction}")
    groups = np.array([_hash_fraction(pair.group, salt) for pair in pairs])
    held_out = groups < fraction
    if len(np.unique(groups)) < 2:
        raise UserError(f"{pairs.name}: all {len(pairs)} pairs are one group, so none can be split off for validation")
    if not held_out.any():
        held_out = groups == groups.min()
    if held_out.all():
        held_out = groups < groups.max()
    return pairs.subset(np.flatnonzero(~held_out)), pairs.subset(np.flatnonzero(held_out))


def _hash_fraction(group: str, salt: str) -> float:
    """A hash of a text, in [0, 1)."""
    digest = hashlib.sha256(f"{salt}\0{group}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


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
    path = Path(path).expanduser()
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
        elif suffix not in _CAPTION_SUFFIXES:
            others.append((f"file that is no image ({f'.{suffix}' if suffix else 'no suffix'})", name))
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


def caption_languages(pairs: Iterable[Pair]) -> list[str]:
    """The distinct languages of the captions, sorted; untagged captions are ignored."""
    return sorted({caption.language for pair in pairs for caption in pair.captions} - {""})
