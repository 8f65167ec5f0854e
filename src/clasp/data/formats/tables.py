"""Tables in text files: .csv and .tsv, .jsonl, and LilT's .json list.

Input: a file. Output: its rows as pairs, each read on demand from its byte range. Note: the file is read once to index
and check all rows; the index has 28 bytes a row, whatever its length, and is mapped where there is a cache folder.
"""

import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

from clasp.data.formats.base import SourceSpec
from clasp.data.formats.ids import IdCollector, image_id, require_unique_ids
from clasp.data.formats.index_cache import IndexArrays, file_stamp, load_or_build_index
from clasp.data.formats.rows import PairRow, RowReader, shorten
from clasp.data.formats.sources import FileSource, read_range, require_inside, require_no_address
from clasp.data.formats.text_encoding import plain_text
from clasp.data.formats.text_rows import TextRowFormat
from clasp.plain_types import Pair, UserError


@dataclass(frozen=True, eq=False)
class TextTable:
    """An opened text table; an ``OpenedSource``."""

    name: str
    file: str
    stamp: str
    opened_as: tuple[str, ...]
    """The key of its index."""
    row_format: TextRowFormat
    reader: RowReader
    root: str
    starts: Int64[np.ndarray, " pairs"]
    stops: Int64[np.ndarray, " pairs"]
    twins: UInt32[np.ndarray, " pairs"]
    hashes: UInt64[np.ndarray, " pairs"]
    id_prefix: str = ""
    path_prefix: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return (*self.opened_as, self.id_prefix, self.path_prefix)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int, /) -> Pair:
        start, stop = int(self.starts[row]), int(self.stops[row])
        record = self.row_format.parse(read_range(self.file, self.stamp, start, stop - start))
        parsed = self.reader(record, f"{self.name} row {row + 1}")
        return pair_from_row(parsed, int(self.twins[row]), self.root, self.id_prefix, self.path_prefix)

    def prefixed(self, id_prefix: str, path_prefix: str) -> "TextTable":
        return replace(self, id_prefix=id_prefix, path_prefix=path_prefix)


def pair_from_row(row: PairRow, twin: int, root: str, id_prefix: str, path_prefix: str) -> Pair:
    """The pair of a row whose image is a path; without a group column, rows of one image are one group."""
    image = image_id(row.image, root)
    id = row.id or f"{id_prefix}{image}{f'#{twin}' if twin else ''}"
    source = FileSource(os.path.join(root, row.image))
    return Pair(id, source, row.captions, row.group or path_prefix + image, row.meta)


def require_image_id(row: PairRow, where: str, spec: SourceSpec) -> str:
    """The id of the image of a row; ``UserError`` when it has no valid image path, or one out of the image root."""
    if not isinstance(row.image, str) or not row.image.strip():
        raise UserError(f"{where} names no image: a path is wanted, not {shorten(row.image)}")
    try:
        possible = b"\0" not in os.fsencode(row.image)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UserError(f"{where} names no image: {shorten(row.image)} cannot be a file name")
    require_no_address(row.image, where)
    if not spec.leaves_root:
        require_inside(row.image, spec.root, where)
    return image_id(row.image, spec.root)


def open_table(spec: SourceSpec, row_format: Callable[[SourceSpec], TextRowFormat]) -> TextTable:
    """Index a text table, checking every row but no image; ``row_format`` makes the parser of its rows."""
    spec = replace(spec, file=plain_text(spec.path, spec.file, spec.cache))
    name, stamp = str(spec.path), file_stamp(spec.file)
    syntax = row_format(spec)
    reader = RowReader.of(spec.columns, syntax.default)

    key = ("table", spec.format, str(spec.path.resolve()), stamp, spec.root, repr(reader), str(spec.leaves_root))

    def table(arrays: IndexArrays) -> TextTable:
        return TextTable(
            name,
            str(spec.file.absolute()),
            stamp,
            key,
            syntax,
            reader,
            spec.root,
            starts=arrays["starts"],
            stops=arrays["stops"],
            twins=arrays["twins"],
            hashes=arrays["hashes"],
        )

    def build() -> IndexArrays:
        collector, starts, stops = IdCollector(name), array("q"), array("q")
        with spec.file.open("rb") as file:
            for start, stop, where, record in syntax.iter_rows(file):
                parsed = reader(record, where)
                collector.add(where, parsed, require_image_id(parsed, where, spec))
                starts.append(start)
                stops.append(stop)
        if not starts:
            raise UserError(f"{name} has no pairs: looked for {syntax.expected}, found none")
        arrays = {"starts": np.array(starts, np.int64), "stops": np.array(stops, np.int64), **collector.finish()}
        require_unique_ids(name, table(arrays))
        return arrays

    return table(load_or_build_index(spec.cache, key, build))
