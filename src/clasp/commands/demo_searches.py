"""The searches of ``clasp demo``: photographs never trained on, and drawings of held-out concepts.

Input: the model of the demo's run. Output: searches with their hits and which of them are correct, as sections of one
contact sheet. Note: what is asked is decided by the rules below, which were fixed before any test picture was searched;
nothing is left out of the picture because it failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.commands.demo_photos import PHOTO_QUERIES, write_photo_pairs
from clasp.commands.search import contact_sheet_rows
from clasp.data.device import to_device
from clasp.data.pairs import Pairs, open_pairs
from clasp.data.samples.emoji import (
    LANGUAGE_NAMES,
    EmojiSample,
    concept_names,
)
from clasp.evaluation.language_sets import macro_set
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.models.inference import EmbeddingModel
from clasp.report.console import progress_bar
from clasp.report.contact_sheet import SheetRow, SheetSection
from clasp.search.engine import SearchEngine
from clasp.search.flat_store import FlatStore
from clasp.search.indexer import Indexer
from clasp.search.query import SearchQuery, WeightedText
from clasp.types import Hit

DRAWING_LANGUAGES = ("en", "cs", "zh", "pt", "de", "uk", "fr", "nl")
"""Trained on and never trained on in turn: of each, the four with most successful searches on validation"""
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


def drawing_queries(
    model: DualEncoder, inputs: FeatureSource, classes: Sequence[str], concepts: Sequence[str]
) -> list[tuple[str, str]]:
    """(concept, language) of the searches among drawings, from their names alone; no picture is read.

    The rule: for each of ``DRAWING_LANGUAGES`` in turn, the concept whose name in that language is nearest to one of
    ``classes``, the names of the image tower's classes, by cosine of their embeddings; each concept once. On validation
    81 % of the tenth of the names that are nearest found a drawing, and 46 % of all.
    """
    names, left = concept_names(), dict.fromkeys(sorted(concepts))
    of_classes, asked = _embed(model, inputs, sorted(set(classes))), []
    for language in DRAWING_LANGUAGES:
        candidates = [concept for concept in left if language in names[concept]]
        texts = [names[concept][language] for concept in candidates]
        nearest = (_embed(model, inputs, texts) @ of_classes.T).amax(dim=1)
        best = candidates[int(nearest.argmax())]
        asked.append((best, language))
        del left[best]
    return asked


@torch.no_grad()
def _embed(model: DualEncoder, inputs: FeatureSource, texts: Sequence[str]) -> Float[Tensor, "n E"]:
    """Embeddings of texts, in their order, from cached features where there are any."""
    device, rows = next(model.parameters()).device, {}
    for some, batch in inputs.read(list(dict.fromkeys(texts))):
        rows.update(zip(some, model.embed_text(to_device(batch, device)), strict=True))
    return torch.stack([rows[text] for text in texts])


def search_drawings(
    model: EmbeddingModel, run: Path, sample: EmojiSample, queries: Sequence[tuple[str, str]]
) -> list[DemoSearch]:
    """Search all pictures of the test concepts; the index stays in the run, for ``clasp search``."""
    pairs, names = open_pairs(sample.multilingual_test()), concept_names()
    asked = [(names[concept], language, concept) for concept, language in queries]
    return _search(model, run / "index", pairs, asked, DRAWING_HITS)


def search_photos(model: EmbeddingModel, run: Path) -> list[DemoSearch]:
    """Search the photographs inside installed packages. Raises ``UserError`` where one of those is missing."""
    pairs, names = open_pairs(write_photo_pairs(run / "photos.jsonl"), image_root=run), concept_names()
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
            Indexer(engine).index(pairs, progress)
        searches = []
        for names, language, target in asked:
            hits = engine.search(SearchQuery((WeightedText(names[language]),)), count)
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
