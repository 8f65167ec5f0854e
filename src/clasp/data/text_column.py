"""A column of texts: one Arrow array of bytes with offsets, in memory or in a memory-mapped file.

Input: texts, or an array of an index file. Output: a sequence of ``str``. Note: ten million Python strings take a
gigabyte, this takes 8 bytes a text beyond its letters, and nothing where the file is mapped. Bytes are UTF-8 that may
hold lone surrogates, so that every ``str`` is returned as it was, and sorting by bytes is sorting by ``str``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

_DECODED_AT_ONCE = 1 << 14  # texts


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class TextColumn(Sequence[str]):
    """The texts ``rows`` of an array, in that order; by default all of them."""

    def __init__(self, values: pa.LargeBinaryArray, rows: Int[np.ndarray, " n"] | None = None) -> None:
        self._values, self._rows = values, rows

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextColumn:
        """A column of these texts: themselves, or in memory."""
        return texts if isinstance(texts, cls) else cls(encode_texts(texts))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], name: str) -> TextColumn:
        """Inverse of ``to_arrays``; copies nothing."""
        ends, letters = (pa.py_buffer(arrays[f"{name}_{part}"]) for part in ("ends", "letters"))
        count = len(arrays[f"{name}_ends"]) - 1
        return cls(pa.LargeBinaryArray.from_buffers(pa.large_binary(), count, [None, ends, letters]))

    def to_arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an index file."""
        values = self._selected()
        ends = np.frombuffer(values.buffers()[1], np.int64)[values.offset :][: len(values) + 1]
        letters = np.frombuffer(values.buffers()[2], np.uint8) if len(values) else np.zeros(0, np.uint8)
        return {f"{name}_ends": ends - ends[0], f"{name}_letters": letters[int(ends[0]) : int(ends[-1])]}

    def __len__(self) -> int:
        return len(self._values) if self._rows is None else len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return self.take(np.arange(len(self))[number])
        row = range(len(self))[number] if self._rows is None else self._rows[number]
        return self._values[int(row)].as_py().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _DECODED_AT_ONCE):
            yield from self[start : start + _DECODED_AT_ONCE]

    def take(self, numbers: Int[np.ndarray, " n"]) -> list[str]:
        """These texts."""
        return [text.decode("utf-8", "surrogatepass") for text in self.select(numbers)._selected().to_pylist()]

    def select(self, numbers: Int[np.ndarray, " n"]) -> TextColumn:
        """These texts as a column of the same array; copies no text."""
        return TextColumn(self._values, numbers if self._rows is None else self._rows[numbers])

    def find(self, texts: Sequence[str]) -> Int[np.ndarray, " n"]:
        """The number of each text in this column, -1 where it is not there."""
        found = pc.call_function("index_in", [TextColumn.of(texts)._selected()], pc.SetLookupOptions(self._selected()))
        return found.fill_null(-1).to_numpy().astype(np.int64)

    def sort_distinct(self) -> tuple[TextColumn, Int[np.ndarray, " n"]]:
        """The distinct texts, sorted, and the number of each text of this column among them."""
        values = self._selected()
        order = pc.call_function("array_sort_indices", [values]).to_numpy().astype(np.int64)
        first = _differs_from_previous(values, order)
        entry = np.empty(len(order), np.int64)
        entry[order] = np.cumsum(first) - 1
        return self.select(order[first]), entry

    def json_pieces(self) -> Iterator[bytes]:
        """``json.dumps(list(self))``, in pieces; no Python string a text."""
        yield b"["
        for start in range(0, len(self), _DECODED_AT_ONCE):
            piece = _json_items(self.select(np.arange(start, min(start + _DECODED_AT_ONCE, len(self))))._selected())
            yield b", " + piece if start else piece
        yield b"]"

    def _selected(self) -> pa.LargeBinaryArray:
        return self._values if self._rows is None else self._values.take(pa.array(self._rows))


def encode_texts(texts: Iterable[str]) -> pa.LargeBinaryArray:
    """The texts as the Arrow array of a ``TextColumn``."""
    return pa.array([_encode(text) for text in texts], pa.large_binary())


_SEPARATOR = b"\0"


def _json_items(values: pa.LargeBinaryArray) -> bytes:
    """The items of a JSON list of the texts; at once as one text, where its separator is in none of them.

    Without a backslash in a text, ``\\u0000`` in the JSON can only be the separator.
    """
    whole = pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)
    joined: bytes = pc.call_function("binary_join", [whole, pa.scalar(_SEPARATOR, pa.large_binary())])[0].as_py()
    if b"\\" in joined or joined.count(_SEPARATOR) != len(values) - 1:
        texts = [text.decode("utf-8", "surrogatepass") for text in values.to_pylist()]
        return json.dumps(texts)[1:-1].encode()
    return json.dumps(joined.decode("utf-8", "surrogatepass")).replace("\\u0000", '", "').encode()


def _differs_from_previous(values: pa.LargeBinaryArray, order: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether each text, in this order, is another than the one before it; a block at a time, as texts are copied."""
    differs = np.ones(len(order), bool)
    for start in range(1, len(order), 1 << 18):
        block = values.take(pa.array(order[start - 1 : start + (1 << 18)]))
        differs[start : start + (1 << 18)] = pc.call_function("not_equal", [block[1:], block[:-1]])
    return differs
