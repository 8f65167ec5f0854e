"""Parquet tables: image paths, image bytes, or the {bytes, path} cells of Hugging Face's datasets.

Input: a file. Output: its rows as pairs; image bytes are read only when the source is read. Note: parquet reads whole
row groups, so the most recent ones are cached (16 without images, one with). For random access to images, use row
groups of a few hundred rows at most. Rows are counted from 0 here.
"""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt32, UInt64

from clasp.data.formats.base import OpenedSource, SourceSpec
from clasp.data.formats.hugging_face import FeatureRows, Features, class_names_by_column, features_of_schema
from clasp.data.formats.ids import IdCollector, require_unique_ids
from clasp.data.formats.image_cells import image_of_cell
from clasp.data.formats.index_cache import IndexArrays, file_stamp, load_or_build_index
from clasp.data.formats.listed_pairs import check_listed_pairs
from clasp.data.formats.rows import ColumnNames, PairRow, RowReader, require_columns
from clasp.data.formats.tables import pair_from_row, require_image_id
from clasp.plain_types import Pair, UserError

_DEFAULT_COLUMNS = ColumnNames(image="image", caption="caption", id="id", language="language", group="group")

_ImageColumnKind = Literal["path", "bytes", "struct"]


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """The image in one cell; for a {bytes, path} cell without bytes, the file at its path, relative to ``root``."""

    path: str
    stamp: str
    column: str
    row: int
    root: str

    @property
    def name(self) -> str:
        return f"{self.path}::row-{self.row}"

    @property
    def version(self) -> str:
        return f"{self.stamp}@{self.row}/{self.column}"

    def read(self) -> bytes:
        cell = _read_cells(_read_image_group, self.path, self.stamp, (self.column,), self.row)[self.column]
        return image_of_cell(cell, self.root, self.name)


@dataclass(frozen=True, eq=False)
class ParquetTable:
    """An opened parquet file; an ``OpenedSource``."""

    name: str
    file: str
    stamp: str
    opened_as: tuple[str, ...]
    """The key of its index."""
    kind: _ImageColumnKind
    non_image_columns: tuple[str, ...]
    """The columns without image bytes."""
    reader: RowReader
    root: str
    twins: UInt32[np.ndarray, " pairs"]
    hashes: UInt64[np.ndarray, " pairs"]
    id_prefix: str = ""
    path_prefix: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return (*self.opened_as, self.id_prefix, self.path_prefix)

    def __len__(self) -> int:
        return len(self.twins)

    def __getitem__(self, row: int, /) -> Pair:
        record = _read_cells(_read_non_image_group, self.file, self.stamp, self.non_image_columns, row)
        parsed = _read_row(record, self.kind, self.reader, f"{self.name} row {row}")
        twin = int(self.twins[row])
        if self.kind == "path":
            return pair_from_row(parsed, twin, self.root, self.id_prefix, self.path_prefix)
        id = parsed.id or f"{self.id_prefix}{_cell_id(parsed, row)}{f'#{twin}' if twin else ''}"
        source = ParquetSource(self.file, self.stamp, self.reader.columns.image, row, self.root)
        return Pair(id, source, parsed.captions, parsed.group or id, parsed.meta)

    def prefixed(self, id_prefix: str, path_prefix: str) -> "ParquetTable":
        return replace(self, id_prefix=id_prefix, path_prefix=path_prefix)


def open_parquet(spec: SourceSpec) -> OpenedSource:
    """Open a parquet file and check every row; reads only the columns without images.

    Of one that ``datasets`` wrote with classes in place of captions, the class names are the captions.
    """
    name, stamp, file = str(spec.path), file_stamp(spec.file), str(spec.file.absolute())
    reader = RowReader.of(spec.columns, _DEFAULT_COLUMNS)
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{name} is not a whole parquet file: {error}") from None
    schema = table.schema_arrow
    if given := features_of_schema(schema):
        plain = {reader.columns.image, reader.columns.caption}
        if not plain <= set(schema.names) - set(class_names_by_column(given)):
            return _open_classes(spec, table, Features.of(given, spec.columns, name))
    require_columns(reader.required, schema.names, name)
    twice = [column for column in schema.names if schema.names.count(column) > 1]
    if twice:
        raise UserError(f"{name} has two columns of one name: {twice[0]!r} among {', '.join(map(repr, schema.names))}")
    image = reader.columns.image
    kind = _image_column_kind(schema.field(image).type, f"{name} column {image!r}")
    # matching "binary" in the type name also finds nested image bytes
    non_image = tuple(field.name for field in schema if "binary" not in str(field.type))
    if kind == "struct" and schema.field(image).type.get_field_index("path") >= 0:
        non_image += (f"{image}.path",)

    for column in reader.columns.named:
        if column != image and column in schema.names and column not in non_image:
            raise UserError(f"{name} column {column!r} holds {schema.field(column).type}; a text is wanted")

    key = ("parquet", spec.format, str(spec.path.resolve()), stamp, spec.root, repr(reader), str(spec.leaves_root))

    def opened(arrays: IndexArrays) -> ParquetTable:
        twins, hashes = arrays["twins"], arrays["hashes"]
        return ParquetTable(name, file, stamp, key, kind, non_image, reader, spec.root, twins, hashes)

    def build() -> IndexArrays:
        collector, row = IdCollector(name), 0
        wanted = [column for column in non_image if column.removesuffix(".path") in reader.columns.named]
        for batch in _batches(table, wanted, name):
            for record in _records(batch, name, row):
                where = f"{name} row {row}"
                parsed = _read_row(record, kind, reader, where)
                collector.add(
                    where,
                    parsed,
                    require_image_id(parsed, where, spec) if kind == "path" else _cell_id(parsed, row),
                )
                row += 1
        if not row:
            raise UserError(f"{name} has no pairs: looked for rows, found none")
        arrays = collector.finish()
        require_unique_ids(name, opened(arrays))
        return arrays

    return opened(load_or_build_index(spec.cache, key, build))


def _batches(table: pq.ParquetFile, columns: list[str], name: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from table.iter_batches(batch_size=4096, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} is damaged: {error}") from None


def _open_classes(spec: SourceSpec, table: pq.ParquetFile, features: Features) -> OpenedSource:
    name, stamp, file = str(spec.path), file_stamp(spec.file), str(spec.file.absolute())
    rows = FeatureRows(
        features, spec.columns, features.caption_column(spec.columns, table.schema_arrow.names, name), name
    )
    others = [field.name for field in table.schema_arrow if "binary" not in str(field.type)]
    pairs: list[Pair] = []
    for batch in _batches(table, others, name):
        for record in _records(batch, name, len(pairs)):
            row = len(pairs)
            pairs.append(rows.pair(record, ParquetSource(file, stamp, features.image, row, spec.root), f"row-{row}"))
    return check_listed_pairs(name, pairs, spec.root)


def _records(batch: pa.RecordBatch, name: str, first: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        last = first + batch.num_rows - 1
        raise UserError(f"{name} rows {first} to {last} hold text that is not UTF-8: {error.reason}") from None


def _read_row(record: dict[str, Any], kind: _ImageColumnKind, reader: RowReader, where: str) -> PairRow:
    if kind != "path":  # bytes were not read; of a struct, at most the path
        record.setdefault(reader.columns.image, None)
    return reader(record, where)


def _cell_id(parsed: PairRow, row: int) -> str:
    """The path in a {bytes, path} cell, else the row number; a table whose rows may be reordered needs an id column."""
    path = parsed.image["path"] if isinstance(parsed.image, dict) else None
    return os.path.normpath(path) if path else f"row-{row}"


def _image_column_kind(type: pa.DataType, where: str) -> _ImageColumnKind:
    if pa.types.is_dictionary(type):
        type = type.value_type
    if pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type):
        return "path"
    if pa.types.is_struct(type) and type.get_field_index("bytes") >= 0:
        return "struct"
    if "binary" in str(type) and not pa.types.is_nested(type):
        return "bytes"
    raise UserError(f"{where} holds {type}; images may be paths (string), bytes (binary) or {{bytes, path}}")


_RowGroupReader = Callable[[str, str, int, tuple[str, ...], int], pa.Table]


def _read_cells(
    read_group: _RowGroupReader, path: str, stamp: str, columns: tuple[str, ...], row: int
) -> dict[str, Any]:
    """One row of these columns, from the row groups cached by ``read_group``."""
    process = os.getpid()  # part of the cache key: a forked worker opens its own file
    ends = _parquet(path, stamp, process).ends
    group = int(np.searchsorted(ends, row, side="right"))
    before = int(ends[group - 1]) if group else 0
    try:
        return read_group(path, stamp, process, columns, group).slice(row - before, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} row {row} holds text that is not UTF-8: {error.reason}") from None
    except IndexError:
        raise UserError(f"{path} is damaged: row group {group} ends before row {row}") from None


@dataclass(frozen=True, eq=False)
class _Parquet:
    file: pq.ParquetFile
    ends: np.ndarray


@functools.lru_cache(maxsize=64)
def _parquet(path: str, stamp: str, process: int) -> _Parquet:
    try:
        if file_stamp(path) != stamp:
            raise UserError(f"{path} was changed after it was opened; open the pairs again")
        file = pq.ParquetFile(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    groups = file.metadata.num_row_groups
    return _Parquet(file, np.cumsum([file.metadata.row_group(group).num_rows for group in range(groups)]))


def _read_group(path: str, stamp: str, process: int, columns: tuple[str, ...], group: int) -> pa.Table:
    try:
        return _parquet(path, stamp, process).file.read_row_group(group, columns=list(columns), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


_read_non_image_group = functools.lru_cache(maxsize=16)(_read_group)
_read_image_group = functools.lru_cache(maxsize=1)(_read_group)
