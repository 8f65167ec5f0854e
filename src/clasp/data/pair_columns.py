"""What all pairs of a source are, column by column: ids, groups, captions and languages, without their images.

Input: pairs. Output: ``PairColumns``. Note: all pairs are read once, on building; of a large source the columns are
then stored in the cache folder and mapped into memory, so a later start reads no pair and the columns take no memory of
the process. Groups, captions and languages are numbered in the order in which they first appear.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32, Int64

from clasp.data.atomic_files import translate_disk_errors
from clasp.data.formats.index_cache import IndexArrays, load_or_build_index
from clasp.data.text_column import TextColumn, encode_texts
from clasp.plain_types import Pair

_READ_AT_ONCE = 1 << 14  # pairs
MIN_STORED_PAIRS = 10_000  # fewer are read as fast as they are loaded


@dataclass(frozen=True, eq=False)
class PairColumns:
    """The columns of pairs; numbers of texts are in ``texts``, and likewise for groups and languages."""

    ids: TextColumn
    groups: TextColumn
    texts: TextColumn
    languages: TextColumn
    group: Int32[np.ndarray, " pairs"]
    caption: Int32[np.ndarray, " captions"]
    language: Int32[np.ndarray, " captions"]
    """The language of each caption."""
    caption_offsets: Int64[np.ndarray, " bounds"]
    """Captions of pair i are numbered ``caption_offsets[i]`` to ``caption_offsets[i + 1]``."""

    @classmethod
    def of(cls, pairs: Iterable[Pair], cache: Path | None = None, key: tuple[str, ...] = ()) -> PairColumns:
        """The columns of pairs; with a ``key``, those that are stored in the cache folder under it."""
        if key:
            arrays = load_or_build_index(cache, ("columns", *key), lambda: _read(pairs, cache))
        else:
            arrays = _read(pairs, None)
        return cls(
            ids=TextColumn.from_arrays(arrays, "ids"),
            groups=TextColumn.from_arrays(arrays, "groups"),
            texts=TextColumn.from_arrays(arrays, "texts"),
            languages=TextColumn.from_arrays(arrays, "languages"),
            group=arrays["group"],
            caption=arrays["caption"],
            language=arrays["language"],
            caption_offsets=arrays["caption_offsets"],
        )


def _read(pairs: Iterable[Pair], cache: Path | None) -> IndexArrays:
    """All columns, from one pass over the pairs."""
    table = _spool(_read_batches(pairs), cache)
    counts = pc.call_function("list_value_length", [table["texts"]]).to_numpy()
    group, groups = _number(table["group"])
    caption, texts = _number(pc.call_function("list_flatten", [table["texts"]]))
    language, languages = _number(pc.call_function("list_flatten", [table["languages"]]))
    columns = {"ids": table["id"].combine_chunks(), "groups": groups, "texts": texts, "languages": languages}
    numbers = {"group": group, "caption": caption, "language": language}
    for name, values in columns.items():
        numbers |= TextColumn(values).to_arrays(name)
    return numbers | {"caption_offsets": np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))}


_SCHEMA = pa.schema(
    [("id", pa.large_binary()), ("group", pa.large_binary())]
    + [(name, pa.large_list(pa.large_binary())) for name in ("texts", "languages")]
)


def _read_batches(pairs: Iterable[Pair]) -> Iterator[pa.RecordBatch]:
    remaining = iter(pairs)
    while some := list(islice(remaining, _READ_AT_ONCE)):
        ends = pa.array(np.cumsum([0, *(len(pair.captions) for pair in some)], dtype=np.int64))
        captions = [caption for pair in some for caption in pair.captions]
        texts, languages = ([caption[part] for caption in captions] for part in (0, 1))
        lists = [pa.LargeListArray.from_arrays(ends, encode_texts(values)) for values in (texts, languages)]
        plain = [encode_texts(values) for values in ([pair.id for pair in some], [pair.group for pair in some])]
        yield pa.record_batch([*plain, *lists], schema=_SCHEMA)


def _spool(batches: Iterator[pa.RecordBatch], cache: Path | None) -> pa.Table:
    """The batches as one table: in an unnamed file of the cache folder, or in memory where there is none.

    Raises ``UserError`` where the folder has no room or cannot be written to.
    """
    if cache is None:
        return pa.Table.from_batches(batches, _SCHEMA)
    with translate_disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as file:
            with pa.ipc.new_stream(file, _SCHEMA) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()


def _number(values: pa.ChunkedArray) -> tuple[Int32[np.ndarray, " n"], pa.LargeBinaryArray]:
    """The number of each value among the distinct ones, and these, in the order in which they first appear."""
    encoded = values.dictionary_encode().combine_chunks()
    return encoded.indices.to_numpy(), encoded.dictionary
