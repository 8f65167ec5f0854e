"""The commands ``clasp index`` and ``clasp search``: embed images with the model of a run, and retrieve them.

Input: a run folder (or an ONNX export, without torch), and images or a query. Output: an ``IndexReport``, or a
``SearchResult`` with a contact sheet. Note: a store belongs to one run (``RUN/index``, or as ``RUN/store.json``
records), since embeddings are comparable only within one model; beside it is the background of calibrated scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from clasp.commands.background import open_background
from clasp.commands.run_store import open_run_store, writable_store
from clasp.commands.search_model import ModelLoader, find_search_model, open_images
from clasp.commands.warm_search import FoundHits, search_title
from clasp.plain_types import Hit, MessageCallback, ProgressFactory, SearchModel, UserError, no_progress_bar
from clasp.report.contact_sheet import SheetRow, Thumbnail, contact_sheet
from clasp.search.answer import RankingPart, SearchAnswer, answer_query, check_part
from clasp.search.background import Background
from clasp.search.engine import SearchEngine
from clasp.search.indexer import NOTHING_COMPUTED, Indexer, IndexReport
from clasp.search.metadata_filter import MetadataFilter, check_filters, parse_filter
from clasp.search.parts import PartVectors
from clasp.search.query import SearchQuery, WeightedImage, parse_words
from clasp.training.unfinished import unfinished_lines

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The query, its answer, and the path of the contact sheet."""

    query: str
    answer: SearchAnswer
    sheet: Path

    @property
    def hits(self) -> list[Hit]:
        """The best hit of each group of near-duplicates, best first."""
        return [ranked.hit for ranked in self.answer.hits]

    def found(self) -> FoundHits:
        """The result as plain data."""
        return FoundHits(self.query, self.answer.to_dict(), self.sheet)


def index_images(
    run: Path,
    source: str,
    *,
    bar: ProgressFactory = no_progress_bar,
    model: SearchModel | None = None,
    store: str | None = None,
    say: MessageCallback = _log.info,
    parts: int = 0,
) -> IndexReport:
    """Embed the images of a folder, or of pairs, into the run's store. Unchanged images are not read again.

    ``model``: that of the run, if it is loaded already. ``store``: the engine of a new index (see ``STORE_FORMS``); it
    is chosen by size if not given. ``parts``: how many parts the images were encoded in (see ``clasp.search.parts``).
    """
    load: ModelLoader = find_search_model(run) if model is None else lambda known=model: known
    items = open_images(run, source)
    for line in unfinished_lines(run):
        say(line)
    model = load()
    with writable_store(run, store, len(items), say) as opened:
        with bar(f"images of {source}") as progress:
            engine = SearchEngine.for_indexing(model, opened)
            computed = PartVectors(run, parts, engine.model.fingerprint) if parts else NOTHING_COMPUTED
            done = Indexer(engine).index(items, progress, computed)
        open_background(run, engine)
        return replace(done, skipped_files=items.skipped_files)


@contextmanager
def open_index(run: Path, filters: Sequence[MetadataFilter] = ()) -> Iterator[tuple[SearchEngine, Background]]:
    """The engine of a run's index and its background, ready to be searched.

    ``UserError`` when there is no index, or a filter fits no entry, before the model is loaded.
    """
    load = find_search_model(run)
    store = open_run_store(run)
    try:
        if not store.count():
            raise UserError("nothing has been indexed yet; type: clasp index RUN FOLDER")
        if filters:
            check_filters(filters, (meta for _, meta in store.scan()))
        engine = SearchEngine(load(), store)
        yield engine, open_background(run, engine)
    finally:
        store.close()


def search_images(
    run: Path,
    text: str | None,
    images: Sequence[tuple[Path, float]],
    k: int,
    where: Sequence[str] = (),
    sheet: Path | None = None,
    only_close: bool = False,
) -> SearchResult:
    """Search the run's store by words (with minus terms), images with weights, or both, and write a contact sheet of
    the ``k`` best hits.

    ``where``: filters such as ``folder=holidays``; ``only_close``: without the hits below the line. Raises
    ``UserError`` when there is no query or no index, for a filter of an unknown field, for ``only_close`` without
    words, or when the contact sheet cannot be written.
    """
    if text is None and not images:
        raise UserError('say what to look for: clasp search RUN "words", or --image FILE, or both')
    query = SearchQuery(parse_words(text) if text else (), tuple(WeightedImage(*each) for each in images))
    filters = [parse_filter(condition) for condition in where]
    part = RankingPart(k, filters=filters, only_close=only_close)
    check_part(part, query)
    with open_index(run, filters) as (engine, background):
        answer = answer_query(
            engine,
            background,
            query,
            part,
            encode_texts=engine.encode_texts,
            encode_images=engine.encode_images,
        )
        title = search_title(text, images)
        path = sheet or run / "search.png"
        found = SearchResult(title, answer, path)
        try:
            contact_sheet(contact_sheet_rows([(title, found.hits)]), path)
        except OSError as error:
            raise UserError(f"the picture of the hits, {path}, cannot be written: {error.strerror or error}") from None
        return found


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
