"""The commands ``clasp index`` and ``clasp search``: embed images with the model of a run, and retrieve them.

Input: a run folder, and images or a query. Output: an ``IndexReport``, or a ``SearchResult`` with a contact sheet.
Note: the store is in the run folder (``RUN/index``), since embeddings are comparable only within one model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clasp.config.build import load
from clasp.config.datasets import open_pairs_for_recipe
from clasp.config.recipe import recipe_from_dict
from clasp.data.pairs import list_images
from clasp.report.contact_sheet import SheetRow, Thumbnail, contact_sheet
from clasp.search.engine import IndexReport, SearchEngine
from clasp.search.flat_store import FlatStore
from clasp.training.run_folder import RunFolder
from clasp.types import Hit, ProgressFactory, UserError, no_progress_bar


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The query, the hits, best first, and the path of their contact sheet."""

    query: str
    hits: list[Hit]
    sheet: Path


def index_images(run: Path, source: str, *, bar: ProgressFactory = no_progress_bar) -> IndexReport:
    """Embed the images of a folder, or of pairs, into the run's store. Unchanged images are not read again."""
    recipe = recipe_from_dict(RunFolder(run).recipe(), str(run))
    items = list_images(source) if Path(source).is_dir() else open_pairs_for_recipe(source, recipe)
    model = load(run)
    store = FlatStore(run / "index")
    try:
        with bar(f"images of {source}") as progress:
            done = SearchEngine.for_indexing(model, store).index(items, progress)
            return replace(done, skipped_files=items.skipped_files)
    finally:
        store.close()


def search_images(run: Path, text: str | None, image: Path | None, k: int, sheet: Path | None = None) -> SearchResult:
    """Search the run's store by a text, an image, or both, and write a contact sheet of the ``k`` best hits.

    Raises ``UserError`` when there is no query or no index, or the contact sheet cannot be written.
    """
    if text is None and image is None:
        raise UserError('say what to look for: clasp search RUN "words", or --image FILE, or both')
    RunFolder(run).recipe()
    if not (run / "index").is_dir():
        raise UserError(f"{run} has no index yet; make one with: clasp index {run} FOLDER")
    store = FlatStore(run / "index")
    try:
        engine = SearchEngine(load(run), store)
        hits = engine.search(text=text, image=image, k=k)
        query = " + ".join(part for part in (text, f"picture {image}" if image else None) if part)
        path = sheet or run / "search.png"
        try:
            contact_sheet(contact_sheet_rows([(query, hits)]), path)
        except OSError as error:
            raise UserError(f"the picture of the hits, {path}, cannot be written: {error.strerror or error}") from None
        return SearchResult(query, hits, path)
    finally:
        store.close()


def contact_sheet_rows(
    searches: Sequence[tuple[str, Sequence[Hit]]],
    *,
    label: Callable[[Hit], str] = lambda hit: hit.id,
    is_correct: Callable[[str, Hit], bool | None] = lambda title, hit: None,
) -> list[SheetRow]:
    """Titles (queries) with their hits, as rows of ``clasp.report.contact_sheet.contact_sheet``.

    ``is_correct`` returns whether a hit is relevant to a title, or ``None`` if unknown. An image that is gone or has
    changed is an empty tile with its label.
    """
    rows = []
    for title, hits in searches:
        tiles = []
        for hit in hits:
            try:
                encoded = SearchEngine.read_image(hit)
            except UserError:
                encoded = None
            tiles.append(Thumbnail(encoded, label(hit), is_correct(title, hit)))
        note = f"cosine {hits[0].score:.2f} to {hits[-1].score:.2f}" if hits else ""
        rows.append(SheetRow(title, tiles, note))
    return rows
