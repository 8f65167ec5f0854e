"""The layout of clip-retrieval: ``img_emb/img_emb_*.npy`` beside ``metadata/metadata_*.parquet``, row by row.

Input: a store, or a folder of that layout. Output: the folder, or its rows. Note: ours has float32 where clip-retrieval
writes float16, two columns of its own (``clasp_id`` and ``clasp_meta``, JSON) beside ``image_path`` and ``caption``,
and ``clasp.json`` with the fingerprint of the model. (Beaumont 2022, https://github.com/rom1504/clip-retrieval)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from clasp.plain_types import ProgressCallback, UserError
from clasp.search.engine import UpdatableStore

_ROWS = 100_000  # of a file
_AT_ONCE = 1000
_FACTS = "clasp.json"
_IMAGES, _METADATA = ("img_emb", "img_emb_{}.npy"), ("metadata", "metadata_{}.parquet")


class ForeignRow(NamedTuple):
    """A row of the layout. ``own``: id and metadata, where a store of clasp was exported."""

    path: str
    caption: str
    own: tuple[str, Mapping[str, Any]] | None


class ForeignRows(NamedTuple):
    """Some rows, and their vectors."""

    rows: list[ForeignRow]
    vectors: Float[np.ndarray, "n E"]


def write_layout(store: UpdatableStore, folder: Path, progress: ProgressCallback) -> int:
    """Write all entries; returns how many. ``UserError`` for a folder that has something in it."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder for the exported embeddings")
    for kind, _ in (_IMAGES, _METADATA):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    entries, total = list(store.scan()), store.count()
    digits = len(str(max(0, total - 1) // _ROWS))
    for start in range(0, len(entries), _ROWS):
        part, number = entries[start : start + _ROWS], f"{start // _ROWS:0{digits}d}"
        ids = [name for name, _ in part]
        vectors = np.concatenate([store.vectors(ids[at : at + _AT_ONCE]) for at in range(0, len(ids), _AT_ONCE)])
        np.save(folder / _IMAGES[0] / _IMAGES[1].format(number), vectors)
        columns = {
            "image_path": [_text(meta["name"]) for _, meta in part],
            "caption": [_text(meta["captions"][0]["text"]) if meta["captions"] else "" for _, meta in part],
            "clasp_id": [json.dumps(name) for name in ids],
            "clasp_meta": [json.dumps(meta) for _, meta in part],
        }
        pq.write_table(pa.table(columns), folder / _METADATA[0] / _METADATA[1].format(number))
        progress(start + len(part), total)
    facts = {"model": store.model, "name": store.model_name, "entries": total}
    (folder / _FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return total


def layout_model(folder: Path) -> str:
    """The fingerprint of the model of the embeddings; empty if the folder was not written by clasp."""
    try:
        return str(json.loads((folder / _FACTS).read_text(encoding="utf-8"))["model"])
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{folder / _FACTS} is damaged; delete it, and the embeddings are compared with images"
        ) from None


def count_rows(folder: Path) -> int:
    """Number of rows. ``UserError`` for a folder that has not this layout."""
    return sum(len(np.load(vectors, mmap_mode="r")) for vectors, _ in _files(folder))


def read_layout(folder: Path) -> Iterator[ForeignRows]:
    """The rows in parts. ``UserError`` for files that do not belong together."""
    for vectors_path, metadata_path in _files(folder):
        vectors = np.load(vectors_path, mmap_mode="r")
        file = pq.ParquetFile(metadata_path)
        names = file.schema_arrow.names
        if vectors.ndim != 2 or file.metadata.num_rows != len(vectors):
            counts = f"{file.metadata.num_rows} rows for vectors of shape {vectors.shape}"
            raise UserError(f"{metadata_path} has {counts}; the two files do not belong together")
        if "image_path" not in names:
            raise UserError(f"{metadata_path} has no column image_path; there are {', '.join(names)}")
        wanted = [name for name in ("image_path", "caption", "clasp_id", "clasp_meta") if name in names]
        start = 0
        for batch in file.iter_batches(_AT_ONCE, columns=wanted):
            rows = [_row(record) for record in batch.to_pylist()]
            part = np.array(vectors[start : start + len(rows)], np.float32)
            yield ForeignRows(rows, part)
            start += len(rows)


def _row(record: Mapping[str, Any]) -> ForeignRow:
    own = None
    if record.get("clasp_meta"):
        own = (json.loads(record["clasp_id"]), json.loads(record["clasp_meta"]))
    return ForeignRow(record["image_path"], record.get("caption") or "", own)


def _files(folder: Path) -> list[tuple[Path, Path]]:
    found = []
    for vectors in sorted((folder / _IMAGES[0]).glob(_IMAGES[1].format("*"))):
        number = vectors.stem.rpartition("_")[2]
        metadata = folder / _METADATA[0] / _METADATA[1].format(number)
        if not metadata.is_file():
            raise UserError(f"{metadata} is missing, which goes with {vectors}")
        found.append((vectors, metadata))
    if not found:
        raise UserError(
            f"{folder} has no img_emb/img_emb_*.npy with metadata/metadata_*.parquet (clip-retrieval's layout)"
        )
    return found


def _text(text: str) -> str:
    """A file name that is not Unicode, escaped; ``clasp_id`` and ``clasp_meta`` have it as it is."""
    return text.encode("utf-8", "backslashreplace").decode()
