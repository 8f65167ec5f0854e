"""The searches of ``clasp demo``: two acts, drawings of concepts never seen and photographs never trained on.

Input: the model of the demo's run. Output: searches with their hits and which of them are correct, as sections of one
contact sheet. Note: what is asked is decided by the rules below, which were fixed before any test picture was searched;
nothing is left out of the picture because it failed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clasp.commands.demo_photos import PHOTO_QUERIES, write_photo_pairs
from clasp.commands.search import contact_sheet_rows
from clasp.data.pairs import Pairs, open_pairs
from clasp.data.samples.emoji import (
    LANGUAGE_NAMES,
    EmojiSample,
    concept_categories,
    concept_names,
)
from clasp.evaluation.language_sets import macro_set
from clasp.models.inference import EmbeddingModel
from clasp.report.contact_sheet import SheetRow, SheetSection
from clasp.report.terminal import progress_bar
from clasp.search.engine import SearchEngine
from clasp.search.flat_store import FlatStore
from clasp.types import Hit

DRAWING_CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects")
DRAWING_LANGUAGES = ("en", "it", "fr", "pt", "es", "nl", "de", "vi")
"""Languages of the searches among drawings: trained on and never trained on in turn"""
DRAWING_HITS, PHOTO_HITS = 8, 4
PHOTO_RANKS = 3
"""A search among photographs counts as successful when the photograph is among as many hits"""


@dataclass(frozen=True, slots=True)
class DemoSearch:
    """One search: what is asked, in which language, and the hits with whether each is correct."""

    query: str
    english: str
    language: str
    hits: Sequence[Hit]
    correct: Sequence[bool]

    def found_within(self, ranks: int) -> bool:
        """Whether a correct result is among the first ``ranks`` hits."""
        return any(self.correct[:ranks])


def drawing_queries(concepts: Sequence[str]) -> list[tuple[str, str]]:
    """(concept, language) of the searches among drawings: the rule.

    Of the concepts in ``DRAWING_CATEGORIES`` of Unicode, in the order of the sha256 of their code points, the i-th is
    asked in the i-th of ``DRAWING_LANGUAGES``.
    """
    categories = concept_categories()
    things = [each for each in sorted(set(concepts)) if categories[each] in DRAWING_CATEGORIES]
    ordered = sorted(things, key=lambda concept: hashlib.sha256(concept.encode()).hexdigest())
    return list(zip(ordered, DRAWING_LANGUAGES, strict=False))


def search_drawings(model: EmbeddingModel, run: Path, sample: EmojiSample) -> list[DemoSearch]:
    """Search all pictures of the test concepts; the index stays in the run, for ``clasp search``."""
    pairs, names = open_pairs(sample.multilingual_test()), concept_names()
    asked = [(names[concept], language, concept) for concept, language in drawing_queries([p.group for p in pairs])]
    return _search(model, run / "index", pairs, asked, DRAWING_HITS)


def search_photos(model: EmbeddingModel, run: Path) -> list[DemoSearch]:
    """Search the photographs inside installed packages. Raises ``UserError`` where one of those is missing."""
    pairs, names = open_pairs(write_photo_pairs(run / "photos.jsonl")), concept_names()
    asked = [(names[query.concept], query.language, query.photo) for query in PHOTO_QUERIES]
    return _search(model, run / "photo-index", pairs, asked, PHOTO_HITS)


def _search(
    model: EmbeddingModel,
    index: Path,
    pairs: Pairs,
    asked: Sequence[tuple[Mapping[str, str], str, str]],
    count: int,
) -> list[DemoSearch]:
    """``asked``: names of a concept by language, the language, and the group or id of correct results."""
    store = FlatStore(index)
    try:
        engine = SearchEngine.for_indexing(model, store)
        with progress_bar("indexing images") as progress:
            engine.index(pairs, progress)
        searches = []
        for names, language, target in asked:
            hits = engine.search(text=names[language], k=count)
            correct = [target in (hit.meta.get("group"), hit.id) for hit in hits]
            searches.append(DemoSearch(names[language], names["en"], language, hits, correct))
        return searches
    finally:
        store.close()


def search_section(
    heading: str, lines: Sequence[str], searches: Sequence[DemoSearch], trained: Sequence[str], layout: tuple[int, int]
) -> SheetSection:
    """Searches as a section of the contact sheet: the query, its meaning and language, and the hits by rank.

    ``trained``: the languages trained on. ``layout``: side of a tile in pixels, and searches abreast.
    """
    rows = []
    for search in searches:
        found = contact_sheet_rows([(search.query, search.hits)])[0]
        tiles = [
            (image, str(rank), correct)
            for rank, ((image, _, _), correct) in enumerate(zip(found.tiles, search.correct, strict=True), start=1)
        ]
        title = language_title(search.language, trained)
        note = title if search.language == "en" else f"“{search.english}” in {title}"
        rows.append(SheetRow(search.query, tiles, note, fallback=search.english))
    return SheetSection(heading, lines, rows, *layout)


def language_title(language: str, trained: Sequence[str]) -> str:
    """The name of a language, "Zulu, never trained on"; the title of a set of languages, ``macro:…``."""
    of_set = macro_set(language)
    if of_set is not None:
        return of_set
    return LANGUAGE_NAMES[language] + ("" if language in trained else ", never trained on")
