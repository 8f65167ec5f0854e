"""``clasp index RUN SOURCE --part 2/8``: one of several processes or machines that encode one collection.

Input: a run folder that all of them see, the source and the part. Output: an ``IndexReport`` of the merged index when
the last part is done. Note: each part has a store of its own in ``RUN/index-parts``, deleted after the merge; an
interrupted part resumes where it stopped. The merge reads no image, except those that have changed since.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clasp.commands.search import index_images
from clasp.commands.search_model import find_search_model, open_images
from clasp.plain_types import MessageCallback, ProgressFactory, SearchModel, UserError
from clasp.search.engine import SearchEngine
from clasp.search.flat_store import FlatStore
from clasp.search.indexer import Indexer, IndexReport
from clasp.search.manifest import lock_store
from clasp.search.parts import (
    PARTS_FOLDER,
    DonePart,
    IndexPart,
    all_parts,
    select_part,
    unfinished_parts,
    write_done,
)
from clasp.training.unfinished import unfinished_lines


class PartsNotReadyError(UserError):
    """Some parts are not done, or another process merges them."""


def index_part(
    run: Path, source: str, part: IndexPart, *, store: str | None, bar: ProgressFactory, say: MessageCallback
) -> IndexReport | None:
    """Encode the images of a part; merge all parts if it is the last. ``None`` while others are not done."""
    unfinished_parts(run, part.count, source)  # refuses what was made from another source
    load, items = find_search_model(run), select_part(open_images(run, source), part)
    for line in unfinished_lines(run):
        say(line)
    model, images = load(), 0
    if items:
        stored = FlatStore(part.folder(run) / "store")
        try:
            with bar(f"part {part} of {source}") as progress:
                engine = SearchEngine.for_indexing(model, stored)
                done = Indexer(engine).index(items, progress)
            model, images = engine.model, stored.count()
        finally:
            stored.close()
        say(f"part {part}: {done}")
    write_done(run, part, DonePart(source, images, model.fingerprint))
    missing = unfinished_parts(run, part.count, source)
    if missing:
        say(f"part {part} is done; not done yet: {_named(missing)}")
        return None
    try:
        return merge_parts(run, source, part.count, store=store, bar=bar, say=say)
    except PartsNotReadyError:
        say(f"part {part} is done; another process merges the parts")
        return None


def merge_parts(
    run: Path, source: str, count: int, *, store: str | None, bar: ProgressFactory, say: MessageCallback
) -> IndexReport:
    """Merge finished parts into the run's index, and delete them. ``UserError`` naming those that are not done."""
    with _only_merge(run):
        missing = unfinished_parts(run, count, source)
        if missing:
            hint = f"clasp index {run} {source} --part {missing[0]}"
            raise PartsNotReadyError(f"parts of {source} that are not done: {_named(missing)}; type: {hint}")
        done = index_images(run, source, bar=bar, model=_model_of_parts(run, count), store=store, say=say, parts=count)
        for part in all_parts(count):
            shutil.rmtree(part.folder(run))
    return done


def _named(parts: list[IndexPart]) -> str:
    return ", ".join(map(str, parts[:8])) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")


def _model_of_parts(run: Path, count: int) -> SearchModel:
    """The model of the run in the precision of the parts."""
    model = find_search_model(run)()
    for part in all_parts(count):
        folder = part.folder(run) / "store"
        if folder.is_dir():
            return model.in_precision_of(FlatStore(folder).model)
    return model


@contextmanager
def _only_merge(run: Path) -> Iterator[None]:
    """One merge at a time; ``PartsNotReadyError`` for a second."""
    folder = run / PARTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = lock_store(folder)
    except UserError:
        raise PartsNotReadyError(f"the parts in {folder} are being merged elsewhere") from None
    try:
        yield
    finally:
        os.close(descriptor)
