"""The commands ``clasp store export`` and ``clasp store import``: the layout of clip-retrieval.

Input: a run folder and the other folder. Output: the number of entries. Note: embeddings that clasp did not export are
taken only if those of a few images, encoded again, are the same: vectors of two models cannot be searched together. The
images are read, since an entry has the hash of its image; those that cannot be read are left out and counted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clasp.commands.background import open_background
from clasp.commands.run_store import open_run_store, writable_store
from clasp.config.build import load
from clasp.data.file_fields import read_file_fields
from clasp.data.pairs import FileSource
from clasp.models.inference import EmbeddingModel
from clasp.search.clip_retrieval import ForeignRow, ForeignRows, count_rows, layout_model, read_layout, write_layout
from clasp.search.engine import SearchEngine
from clasp.search.entries import entry_metadata
from clasp.types import Caption, MessageCallback, Pair, ProgressFactory, UserError

_COMPARED = 8  # images that are encoded again
_SAME = 0.99  # cosine of the two; float16 and another decoder make less than this of a difference


@dataclass(frozen=True, slots=True)
class StoreImport:
    """Entries added, and rows left out because their image cannot be read."""

    added: int
    unreadable: int


def export_index(run: Path, folder: Path, *, bar: ProgressFactory) -> int:
    """Write the run's index in the layout of clip-retrieval; returns the number of entries."""
    store = open_run_store(run)
    try:
        if not store.count():
            raise UserError("nothing has been indexed yet; type: clasp index RUN FOLDER")
        with bar(f"entries to {folder}") as progress:
            return write_layout(store, folder, progress)
    finally:
        store.close()


def import_index(
    run: Path, folder: Path, *, store: str | None, bar: ProgressFactory, say: MessageCallback
) -> StoreImport:
    """Add embeddings of this layout to the run's index. ``UserError`` if they are another model's."""
    total, made_with = count_rows(folder), layout_model(folder)
    model = load(run).in_precision_of(made_with)
    if made_with and made_with != model.fingerprint:
        raise UserError(f"{folder} was made with another model ({made_with[:12]}), not that of {run}")
    if not made_with:
        _require_same_model(model, folder)
    added, unreadable = 0, 0
    with writable_store(run, store, total, say) as opened:
        engine = SearchEngine.for_indexing(model, opened)
        if made_with and engine.model.fingerprint != made_with:
            raise UserError(f"{folder} was made in another precision than the index of {run}")
        with bar(f"entries of {folder}") as progress:
            for part in read_layout(folder):
                done = _add(engine, part)
                added, unreadable = added + done, unreadable + len(part.rows) - done
                progress(added + unreadable, total)
        if not added:
            raise UserError(f"none of the {total:,} images of {folder} can be read; are they on this machine?")
        open_background(run, engine)
    return StoreImport(added, unreadable)


def _add(engine: SearchEngine, part: ForeignRows) -> int:
    entries = [row.own or _read_entry(row) for row in part.rows]
    kept = [place for place, entry in enumerate(entries) if entry is not None]
    named = [entry for entry in entries if entry is not None]
    engine.store.add([name for name, _ in named], part.vectors[kept], [meta for _, meta in named])
    return len(kept)


def _read_entry(row: ForeignRow) -> tuple[str, dict] | None:
    """Id and metadata of an image file; ``None`` if it cannot be read."""
    source = FileSource(row.path)
    try:
        version, data = source.version, source.read()
    except (OSError, UserError):
        return None
    captions = (Caption(row.caption, ""),) if row.caption else ()
    pair = Pair(row.path, source, captions, row.path)
    return pair.id, entry_metadata(pair, version, hashlib.sha256(data).hexdigest(), (), read_file_fields(data))


def _require_same_model(model: EmbeddingModel, folder: Path) -> None:
    """Encode the first few images that can be read, and compare."""
    for part in read_layout(folder):
        places = [place for place, row in enumerate(part.rows) if Path(row.path).is_file()][:_COMPARED]
        if not places:
            continue
        own = model.encode_image([part.rows[place].path for place in places]).numpy()
        given = part.vectors[places] / np.linalg.norm(part.vectors[places], axis=1, keepdims=True)
        if own.shape != given.shape:
            raise UserError(f"{folder} has embeddings {given.shape[1]} wide, and the model of the run {own.shape[1]}")
        lowest = float((own * given).sum(axis=1).min())
        if lowest < _SAME:
            raise UserError(
                f"{folder} was made with another model: an image that is encoded again has a cosine of {lowest:.3f} "
                "with its embedding there"
            )
        return
    raise UserError(f"no image of {folder} can be read here, so its embeddings cannot be compared with the model's")
