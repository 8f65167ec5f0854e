"""Data sets of Hugging Face on disk: folders of arrow files (``save_to_disk``), and the features of parquet files.

Input: a folder with ``dataset_info.json`` and ``.arrow`` files, or a parquet file with a class column. Output: its
pairs. The features tell which column has the images, and the names of classes. Note: ``datasets`` is not needed; arrow
files are mapped into memory, and the bytes of an image are read when the source is.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from clasp.data.formats.base import OpenedSource, SourceSpec
from clasp.data.formats.image_cells import image_of_cell
from clasp.data.formats.index_cache import file_stamp
from clasp.data.formats.listed_pairs import check_listed_pairs
from clasp.data.formats.rows import ColumnNames, as_text, parse_captions, require_columns
from clasp.data.formats.setting_hints import ColumnError
from clasp.data.formats.sources import require_inside
from clasp.plain_types import Caption, ImageSource, Pair, UserError

INFO_FILE, SPLITS_FILE = "dataset_info.json", "dataset_dict.json"
_STATE_FILE = "state.json"
_CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences")


@dataclass(frozen=True, slots=True)
class Features:
    """What the columns hold: the one with images, those with captions or other values, and the names of classes."""

    image: str
    classes: Mapping[str, Sequence[str]]
    """Column of class numbers, or of lists of them, to the names"""

    @classmethod
    def of(cls, given: Mapping[str, Any], columns: ColumnNames, where: str) -> "Features":
        """The features as ``datasets`` writes them. Raises ``ColumnError`` without one column of images."""
        images = [name for name, feature in given.items() if _kind(feature) == "Image"]
        if columns.image:
            require_columns([columns.image], list(given), where)
            images = [columns.image]
        if len(images) != 1:
            raise ColumnError(f"{where} has {len(images)} image columns; its columns: {', '.join(given)}")
        return cls(images[0], class_names_by_column(given))

    def caption_column(self, columns: ColumnNames, names: Sequence[str], where: str) -> str:
        """The column of captions, else the only one of classes. Raises ``ColumnError`` naming the choices."""
        if columns.caption:
            require_columns([columns.caption], names, where)
            return columns.caption
        found = next((name for name in _CAPTION_COLUMNS if name in names), None)
        label = next((name for name in ("label", "labels") if name in self.classes), None)
        if found or label or len(self.classes) == 1:
            return found or label or next(iter(self.classes))
        raise ColumnError(f"{where}: which column has the captions? its columns: {', '.join(names)}")


def class_names_by_column(given: Mapping[str, Any]) -> dict[str, list[str]]:
    """The columns of classes, or of lists of them, among the features that ``datasets`` writes."""
    return {name: names for name, feature in given.items() if (names := _class_names(feature))}


def _kind(feature: Any) -> str:
    return feature.get("_type", "") if isinstance(feature, dict) else ""


def _class_names(feature: Any) -> list[str]:
    """The names of a class column, or of one of lists of classes."""
    inner: Any = feature
    if _kind(feature) in ("Sequence", "List", "LargeList"):
        inner = feature["feature"]
    elif isinstance(feature, list) and feature:  # a sequence, as older releases write it
        inner = feature[0]
    return list(inner["names"]) if _kind(inner) == "ClassLabel" else []


def features_of_schema(schema: pa.Schema) -> dict[str, Any]:
    """The features that ``datasets`` writes into a file; empty where it wrote none."""
    text = (schema.metadata or {}).get(b"huggingface")
    return {} if text is None else json.loads(text).get("info", {}).get("features", {})


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Makes pairs of the rows of a data set, ``where`` as named in errors."""

    features: Features
    columns: ColumnNames
    caption: str
    where: str

    def pair(self, record: Mapping[str, Any], image: ImageSource, id: str) -> Pair:
        """The pair of a row; ``id``: where the row has none of its own."""
        meta: dict[str, Any] = {}
        for name, value in record.items():
            meta |= self._named(name, value)
        captions = self._captions(record)
        id = as_text(record.get(self.columns.id or "id"), self.where, "id") or id
        group = as_text(record.get(self.columns.group or "group"), self.where, "group") or id
        return Pair(id, image, captions, group, meta)

    def _named(self, name: str, value: Any) -> dict[str, Any]:
        """A value for the meta; class numbers become names, and those of the main column also ``class``."""
        if name not in self.features.classes:
            return {} if name == self.caption else {name: value}
        names = self.features.classes[name]
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int) and 0 <= number < len(names) for number in numbers):
            raise UserError(f"{self.where}: {name} = {value!r} is not a class number below {len(names)}")
        named = [names[number] for number in numbers]
        main = name in ("label", "labels") or len(self.features.classes) == 1 or name == self.caption
        if isinstance(value, list):
            return {name: named} | ({"classes": named} if main else {})
        return {name: named[0]} | ({"label": value, "class": named[0]} if main else {})

    def _captions(self, record: Mapping[str, Any]) -> tuple[Caption, ...]:
        value: Any = record[self.caption]
        if self.caption not in self.features.classes:
            return parse_captions(value, record.get(self.columns.language or "language"), self.where)
        names = self.features.classes[self.caption]
        numbers: list[int] = value if isinstance(value, list) else [value]
        return tuple(Caption(str(names[number])) for number in numbers)


# --- arrow files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ArrowSource:
    """The image in one cell of an arrow file."""

    path: str
    stamp: str
    column: str
    row: int

    @property
    def name(self) -> str:
        return f"{self.path}::row-{self.row}"

    @property
    def version(self) -> str:
        return f"{self.stamp}@{self.row}/{self.column}"

    def read(self) -> bytes:
        cell = _read_arrow(self.path, self.stamp, os.getpid()).column(self.column)[self.row].as_py()
        return image_of_cell(cell, os.path.dirname(self.path), self.name)


def open_arrow_folder(spec: SourceSpec) -> OpenedSource:
    """Open a data set that was saved with ``save_to_disk``. Raises ``UserError``."""
    try:
        given = json.loads((spec.path / INFO_FILE).read_text("utf-8"))["features"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{spec.path / INFO_FILE} has no features: {error}") from None
    features = Features.of(given, spec.columns, str(spec.path))
    rows = FeatureRows(
        features, spec.columns, features.caption_column(spec.columns, list(given), str(spec.path)), str(spec.path)
    )
    pairs, first = [], 0
    for file in _arrow_files(spec.path):
        path, stamp = str(file.absolute()), file_stamp(file)
        table = _read_arrow(path, stamp, os.getpid())
        others = [name for name in table.column_names if name != features.image and not _holds_bytes(table, name)]
        for row, record in enumerate(table.select(others).to_pylist()):
            pairs.append(rows.pair(record, ArrowSource(path, stamp, features.image, row), f"row-{first + row}"))
        first += len(table)
    return check_listed_pairs(str(spec.path), pairs, str(spec.path.absolute()))


def _arrow_files(folder: Path) -> list[Path]:
    """The files of the rows, in order; others are caches of ``datasets``, such as ``cache-0123.arrow``."""
    state = folder / _STATE_FILE
    if not state.is_file():
        return sorted(file for file in folder.glob("*.arrow") if not file.name.startswith("cache-"))
    try:
        names = [str(each["filename"]) for each in json.loads(state.read_text("utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state} lists no data files: {error}") from None
    for name in names:
        require_inside(name, str(folder), str(state))
    return [folder / name for name in names]


def refuse_split_folder(spec: SourceSpec) -> OpenedSource:
    """Raises ``UserError`` with the splits of a folder of several."""
    splits = sorted(each.name for each in spec.path.iterdir() if (each / INFO_FILE).is_file())
    raise UserError(f"{spec.path} has the splits {', '.join(splits) or 'none'}; name one: {spec.path / 'SPLIT'}")


def _holds_bytes(table: pa.Table, name: str) -> bool:
    return "binary" in str(table.schema.field(name).type)


@functools.lru_cache(maxsize=64)
def _read_arrow(path: str, stamp: str, process: int) -> pa.Table:
    """The table of a file, mapped into memory; ``process``: a forked worker maps it anew."""
    try:
        if file_stamp(path) != stamp:
            raise UserError(f"{path} was changed after it was opened; open the pairs again")
        mapped = pa.memory_map(path)
        try:
            return pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(mapped).read_all()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a whole arrow file: {error}") from None
