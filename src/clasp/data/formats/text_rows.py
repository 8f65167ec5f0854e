"""Parsers of text tables: JSON lines, a JSON list, and delimited (csv, tsv) rows.

Input: a file opened for reading bytes. Output: a ``LocatedRow`` for each row, with its byte range, so that it can be
read again alone. Note: byte ranges are exact also where quoted cells contain line breaks, since the csv reader consumes
lines on demand; an unclosed quote, or a row with too many cells, is an error. The delimiter is that of the format if
the required columns are found with it, else the first of ``_SEPARATORS`` with which they are.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, NamedTuple, Protocol, runtime_checkable

from clasp.data.formats.base import SourceSpec
from clasp.data.formats.rows import ColumnNames, RowReader, load_json, unique_keys
from clasp.plain_types import UserError


class LocatedRow(NamedTuple):
    """One row and its byte range, ``start`` to ``stop`` (exclusive)."""

    start: int
    stop: int
    where: str
    record: dict[str, Any]


@runtime_checkable
class TextRowFormat(Protocol):
    """A parser of the rows of a file."""

    default: ClassVar[ColumnNames]
    expected: ClassVar[str]

    def iter_rows(self, file: BinaryIO) -> Iterator[LocatedRow]: ...

    def parse(self, data: bytes) -> dict[str, Any]:
        """Parse the bytes of one row again."""
        ...


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line; blank lines are skipped."""

    name: str
    default: ClassVar = ColumnNames(image="image", caption="caption", id="id", language="language", group="group")
    expected: ClassVar = "one JSON object a line"

    @classmethod
    def of(cls, opening: SourceSpec) -> "JsonLines":
        return cls(str(opening.path))

    def iter_rows(self, file: BinaryIO) -> Iterator[LocatedRow]:
        stop = 0
        for number, line in enumerate(file, 1):
            start, stop = stop, stop + len(line)
            if line.isspace():
                continue
            where = f"{self.name} line {number}"
            try:
                record = load_json(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise UserError(f"{where} must be a JSON object such as {{'image': 'a.jpg', 'caption': 'a dog'}}")
            yield LocatedRow(start, stop, where, record)

    def parse(self, data: bytes) -> dict[str, Any]:
        return load_json(data)


@dataclass(frozen=True)
class JsonList:
    """A JSON list of objects {image, image_id, caption}, as LilT and ALBEF write them.

    The whole file is in memory while it is being opened.
    """

    name: str
    default: ClassVar = ColumnNames(image="image", caption="caption", id="id", language="language", group="image_id")
    expected: ClassVar = "a list of objects {image, image_id, caption}"

    @classmethod
    def of(cls, opening: SourceSpec) -> "JsonList":
        return cls(str(opening.path))

    def iter_rows(self, file: BinaryIO) -> Iterator[LocatedRow]:
        try:
            yield from self._objects(file.read().decode())
        except UserError:
            raise
        except RecursionError:
            raise UserError(f"{self.name} is not JSON that can be read: it is nested too deeply") from None
        except ValueError as error:
            raise UserError(f"{self.name} is not JSON: {error}") from None

    def _objects(self, text: str) -> Iterator[LocatedRow]:
        decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
        at = _skip_blanks(text, 0, "\ufeff \t\r\n")
        if text[at : at + 1] != "[":
            raise UserError(f"{self.name} must hold {self.expected}; one object a line is .jsonl")
        at = _skip_blanks(text, at + 1)
        number, seen, stop = 0, 0, 0  # the first ``seen`` characters are ``stop`` bytes
        while text[at : at + 1] != "]":
            record, end = decoder.raw_decode(text, at)
            number += 1
            where = f"{self.name} entry {number}"
            if not isinstance(record, dict):
                raise UserError(f"{where} must be an object such as {{'image': 'a.jpg', 'caption': 'a dog'}}")
            start = stop + len(text[seen:at].encode())
            seen, stop = end, start + len(text[at:end].encode())
            yield LocatedRow(start, stop, where, record)
            at = _skip_blanks(text, end)
            if text[at : at + 1] == ",":
                at = _skip_blanks(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("',' or ']' is wanted after an entry", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("something follows the list", text, at + 1)

    def parse(self, data: bytes) -> dict[str, Any]:
        return load_json(data)


@dataclass(frozen=True)
class DelimitedRows:
    """Delimited cells, quoted with ``"`` where needed, below a header line; UTF-8."""

    name: str
    delimiter: str
    header: tuple[str, ...]
    default: ClassVar = ColumnNames(image="filepath", caption="title", id="id", language="language", group="group")
    expected: ClassVar = "rows below a line of column names"

    @classmethod
    def of(cls, opening: SourceSpec, delimiter: str) -> "DelimitedRows":
        name = str(opening.path)
        headers, errors = _headers(opening, name, delimiter)
        required = RowReader.of(opening.columns, cls.default).required
        fitting = [separator for separator, header in headers.items() if set(required) <= set(header)]
        if delimiter in errors and not fitting:
            raise errors[delimiter]
        widest = max(headers, key=lambda separator: len(headers[separator]))  # the first of equals
        delimiter = fitting[0] if fitting else widest
        header = headers[delimiter]
        if not header:
            raise UserError(f"{name} is empty; looked for {cls.expected}")
        if len(set(header)) < len(header):
            raise UserError(f"{opening.path} has two columns of one name: {', '.join(map(repr, header))}")
        return cls(name, delimiter, header)

    def iter_rows(self, file: BinaryIO) -> Iterator[LocatedRow]:
        rows = _split_cells(file, self.delimiter, self.name)
        next(rows)
        for cells, start, stop, where in rows:
            if len(cells) != len(self.header):
                raise UserError(
                    f"{where} has {len(cells)} cells and the first line has {len(self.header)}, cut at "
                    f"{self.delimiter!r}; a cell that holds {self.delimiter!r} must be in double quotes"
                )
            yield LocatedRow(start, stop, where, dict(zip(self.header, cells, strict=True)))

    def parse(self, data: bytes) -> dict[str, Any]:
        cells = next(csv.reader([data.decode()], delimiter=self.delimiter, strict=True))
        return dict(zip(self.header, cells, strict=True))


_SEPARATORS = (",", "\t", ";", "|")


def _headers(opening: SourceSpec, name: str, own: str) -> tuple[dict[str, tuple[str, ...]], dict[str, UserError]]:
    """By separator, that of the format first: the cells of the header line, or the error of parsing it."""
    headers: dict[str, tuple[str, ...]] = {}
    errors: dict[str, UserError] = {}
    for separator in dict.fromkeys((own, *_SEPARATORS)):
        try:
            with opening.file.open("rb") as file:
                headers[separator] = next(_split_cells(file, separator, name), ((), 0, 0, ""))[0]
        except UserError as error:
            errors[separator] = error
    return headers, errors


def _split_cells(file: BinaryIO, delimiter: str, name: str) -> Iterator[tuple[tuple[str, ...], int, int, str]]:
    """Rows as cells, each with its byte range and its location for errors; empty lines are skipped."""
    taken = 0

    def lines() -> Iterator[str]:  # the csv reader consumes no line beyond its row, so ``taken`` is exact
        nonlocal taken
        for line in file:
            text = line.decode("utf-8" if taken else "utf-8-sig")
            taken += len(line)
            yield text

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        start, where = taken, f"{name} line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 text: {error.reason} {error.object[error.start]:#x}") from None
        except csv.Error as error:
            raise UserError(f"{where} cannot be read as cells: {_cell_error(error)}") from None
        if cells:
            yield tuple(cells), start, taken, where


def _cell_error(error: csv.Error) -> str:
    if "field limit" in str(error):
        return f"a cell is longer than {csv.field_size_limit():,} characters; is a double quote never closed?"
    return f"{error}; is a double quote never closed?" if "end of data" in str(error) else str(error)


def _skip_blanks(text: str, at: int, blank: str = " \t\r\n") -> int:
    """The first position from ``at`` on whose character is not in ``blank``."""
    while at < len(text) and text[at] in blank:
        at += 1
    return at
