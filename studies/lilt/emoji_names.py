"""The world of claim 4: drawings of concepts and their names in many languages, several of which are held out.

Input: the folder of the emoji corpus (described in its README). Output: pairs, initial heads and answers for ``cells``.
Note: a query is a drawing, and the candidates are the names of the test concepts in one language, each language
evaluated separately. Concepts, not drawings, are resampled: three drawings of a concept are not three independent
observations. Learning rates are selected on the validation concepts in the validation style, in the trained languages.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from studies.evaluation import Answer, Seen, images_seen, log_likelihood, retrieval, texts_seen
from studies.lilt.initial_heads import Rows, Start, closed_form
from studies.lilt.photos import drawn

from clasp.config.build import ModelAndPreprocessing
from clasp.config.recipe import Recipe, read_recipe
from clasp.data.formats.tar import open_tar
from clasp.data.pairs import Pairs
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.zeroshot import ZeroShotQueries
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.types import Caption, ImageSource, Pair, PooledFeatures, UserError

TRAINED = {"rich": ("en", "de", "es", "ru", "hi", "zh"), "poor": ("sw", "am")}
HELD_OUT = {"rich": ("fr", "tr", "ja"), "poor": ("cy", "yo", "zu", "km", "so")}
"""High-resource and low-resource languages, by amount of text on the web."""
STYLES, STYLE_TO_CHOOSE, STYLE_TO_ASK = ("noto", "twemoji", "fluent3d"), "emojione", "openmoji"
START = 3  # every third training concept is used to initialise heads


FILE = Path(__file__).with_name("emoji_names.toml")


@dataclass(frozen=True)
class Names:
    """The emoji corpus; core concepts only."""

    folder: Path
    ridge: tuple[float, float] = (2.0, 0.5)
    file: Path = FILE

    @property
    def recipe(self) -> Recipe:
        """The common recipe of all rows."""
        return read_recipe(self.file)

    # --- training ------------------------------------------------------------------------------------------------

    def pairs(self, count: int, seed: int) -> tuple[Pairs, Pairs]:
        """Training pairs: drawings with their names in the trained languages, one sampled; and a few for validation."""
        few = self.drawings(self.concepts("val")[:32], [STYLE_TO_CHOOSE], ["en"])
        return drawn(self._to_train, count, seed), few

    @cached_property
    def _to_train(self) -> Pairs:
        concepts = [one for place, one in enumerate(self.concepts("train")) if place % START]
        return self.drawings(concepts, STYLES, _languages(TRAINED))

    @cached_property
    def outside(self) -> Pairs:
        """Drawings of concepts that never train, for initialising heads only."""
        return self.drawings(self.concepts("train")[::START], STYLES, _languages(TRAINED))

    def start(self, parts: ModelAndPreprocessing, inputs: FeatureSource, *pairs: Pairs) -> Start:
        """Closed-form heads from these pairs together; all captions are used."""
        first, *others = (self._rows(parts, inputs, each) for each in pairs)
        held = self._rows(parts, inputs, self.drawings(self.concepts("val"), [STYLE_TO_CHOOSE], ["en"]))
        rows = reduce(Rows.and_those_of, others, first)
        return closed_form(rows, held, width=self.recipe.head.width, ridge=self.ridge)

    def _rows(self, parts: ModelAndPreprocessing, inputs: FeatureSource, pairs: Pairs) -> Rows:
        said = [(pair.id, caption.text) for pair in pairs for caption in pair.captions]
        images = images_seen(parts.model, inputs, pairs)
        texts = texts_seen(parts.model, inputs, (text for _, text in said))
        captions = tuple(text for _, text in said)
        return Rows(images.of(name for name, _ in said), texts.of(captions), captions)

    # --- evaluation ----------------------------------------------------------------------------------------------

    def validate(self, model: DualEncoder, inputs: FeatureSource) -> float:
        """The learning rate selection metric: log-likelihood of the correct name, mean over the trained languages."""
        concepts = self.concepts("val")
        pairs = self.drawings(concepts, [STYLE_TO_CHOOSE], ["en"])
        seen = images_seen(model, inputs, pairs)
        drawn_concepts = {pair.group for pair in pairs}
        known = [concept for concept in concepts if concept["concept"] in drawn_concepts]
        found = []
        for language in _languages(TRAINED):
            names = {concept["concept"]: name_in(concept, language) for concept in known}
            classes = list(dict.fromkeys(names.values()))  # two concepts may have the same name
            labels = {pair.id: names[pair.group] for pair in pairs}
            question = ZeroShotQueries(labels=labels, classes=classes, templates=["{}"], read=inputs.read)
            found.append(log_likelihood(model, seen, question))
        return sum(found) / len(found)

    def ask(self, model: DualEncoder, inputs: FeatureSource) -> dict[str, Answer]:
        """``T4/LANGUAGE/recall@5`` (new concepts in a new style) and ``T3/...`` (new concepts in trained styles)."""
        concepts = self.concepts("test")
        languages = _languages(TRAINED) + _languages(HELD_OUT)
        texts = texts_seen(model, inputs, (name_in(one, language) for one in concepts for language in languages))
        answers: dict[str, Answer] = {}
        for cell, styles in (("T4", [STYLE_TO_ASK]), ("T3", list(STYLES))):
            pairs = self.drawings(concepts, styles, ["en"])
            seen = images_seen(model, inputs, pairs)
            for language in languages:
                found = retrieval(model, seen, self._question(model, pairs, texts, language))
                answers |= {f"{cell}/{language}/{key.rpartition('/')[2]}": value for key, value in found.items()}
        return answers

    def _question(self, model: DualEncoder, pairs: Pairs, texts: Seen, language: str) -> RetrievalQueries:
        names = {one["concept"]: name_in(one, language) for one in self.concepts("test")}
        pooled = PooledFeatures(texts.of(names.values()).to(next(model.parameters()).device))
        return RetrievalQueries(
            image_groups={pair.id: pair.group for pair in pairs},
            text_groups={concept: concept for concept in names},
            texts=lambda: [(list(names), pooled)],
            directions=("image_to_text",),
        )

    # --- files ---------------------------------------------------------------------------------------------------

    @cached_property
    def _all(self) -> list[dict[str, Any]]:
        file = self.folder / "captions.jsonl.gz"
        if not file.exists():
            raise UserError(f"{self.folder} has no captions.jsonl.gz; --emoji wants the folder of the emoji corpus")
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def concepts(self, split: str) -> list[dict[str, Any]]:
        """The core concepts of ``train``, ``val`` or ``test``."""
        return [one for one in self._all if one["core"] and one["split"] == split]

    def drawings(self, concepts: Iterable[dict[str, Any]], styles: Sequence[str], languages: Sequence[str]) -> Pairs:
        """A pair for each drawing; the drawings of a concept are one group."""
        pairs = [
            Pair(f"{style}_{concept}", drawing, captions, concept)
            for one in concepts
            for concept, captions in [(one["concept"], tuple(Caption(name_in(one, at), at) for at in languages))]
            for style in styles
            if (drawing := self._files[style].get(concept)) is not None
        ]
        return Pairs("emoji", [pairs])

    @cached_property
    def _files(self) -> dict[str, dict[str, ImageSource]]:
        """By style and concept."""
        found: dict[str, dict[str, ImageSource]] = {}
        for style in (*STYLES, STYLE_TO_CHOOSE, STYLE_TO_ASK):
            tar = open_tar(self.folder / f"{style}.tar", self.folder / f"{style}.tar", None)
            names = {str(name): row for row, name in enumerate(tar.names) if str(name).endswith(".webp")}
            found[style] = {
                name.removeprefix(f"{style}_").removesuffix(".webp"): tar.source(row) for name, row in names.items()
            }
        return found


def _languages(sets: dict[str, tuple[str, ...]]) -> list[str]:
    return [language for languages in sets.values() for language in languages]


def name_in(concept: dict[str, Any], language: str) -> str:
    """The names of a concept."""
    return concept["locales"][language]["name"]
