"""The world of claims 1, 2, 3 and 5: small photos, which of them train, and what is asked of a model that was trained.

In: the folder of the photos (webdataset shards; its README says what they are). Out: pairs, starts and answers for
``cells``. Unusual: training photos lie on three sides. Heads start from one, towers and heads train on the second, the
third chooses learning rates. So the towers meet photos that the heads do not know by heart, and the first gradients
say something. Each seed draws its own photos to train on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from studies.evaluation import Answer, images_seen, log_likelihood, probed, retrieval, sentences, texts_seen, zero_shot
from studies.lilt.initial_heads import Rows, Start, closed_form

from clasp.config.build import ModelAndPreprocessing
from clasp.config.recipe import Recipe, read_recipe
from clasp.data.pairs import ColumnNames, Pairs, open_pairs
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.zeroshot import ZeroShotQueries
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.types import PooledFeatures, UserError

EVERY = 2  # of the classes, every second is in the study: twice as many photos of each in a short run


def drawn(pairs: Pairs, count: int, seed: int) -> Pairs:
    """``count`` of the pairs, drawn for a seed; fewer are always among the more."""
    if count > len(pairs):
        raise UserError(f"{pairs.name}: {count} pairs are asked for, and there are {len(pairs)}")
    return pairs.subset(np.random.Generator(np.random.PCG64(seed)).permutation(len(pairs))[:count])


FILE = Path(__file__).with_name("photos.toml")


@dataclass(frozen=True)
class Sizes:
    """How many of each are asked about."""

    held: int
    test: int
    objects: int
    objects_to_fit: int
    scenes: int
    """Photos whose captions are compared with each other; those of Flickr8k's small validation part come first."""


SMALL = Sizes(held=480, test=1200, objects=500, objects_to_fit=300, scenes=200)
WHOLE = Sizes(held=1000, test=1200, objects=1000, objects_to_fit=2000, scenes=900)


@dataclass(frozen=True)
class Photos:
    """Half the classes of Tiny-ImageNet (trained on, and asked about); CIFAR-10 and Flickr8k (asked about only)."""

    folder: Path
    sizes: Sizes = SMALL
    ridge: tuple[float, float] = (1.0, 1.0)
    file: Path = FILE

    @property
    def recipe(self) -> Recipe:
        """What all rows have in common."""
        return read_recipe(self.file)

    # --- what trains ---------------------------------------------------------------------------------------------

    def pairs(self, count: int, seed: int) -> tuple[Pairs, Pairs]:
        """To train on; and a few that a run is asked about at its end, which decides nothing here."""
        return drawn(self._train, count, seed), self._held[:64]

    def start(self, parts: ModelAndPreprocessing, inputs: FeatureSource, more: Pairs | None) -> Start:
        """Heads in closed form for the towers in ``parts``, from pairs that never train, and ``more`` where given."""
        rows = self._rows(parts, inputs, self._first)
        if more is not None:
            rows = rows.and_those_of(self._rows(parts, inputs, more))
        held = self._rows(parts, inputs, self._held[:256])
        return closed_form(rows, held, width=self.recipe.head.width, ridge=self.ridge)

    def _rows(self, parts: ModelAndPreprocessing, inputs: FeatureSource, pairs: Pairs) -> Rows:
        said = [pair.captions[0].text for pair in pairs]
        images, texts = images_seen(parts.model, inputs, pairs), texts_seen(parts.model, inputs, said)
        return Rows(images.of(pair.id for pair in pairs), texts.of(said), tuple(said))

    # --- what is asked -------------------------------------------------------------------------------------------

    def validate(self, model: DualEncoder, inputs: FeatureSource) -> float:
        """What chooses learning rates: how likely the right class is on photos held out of training."""
        held = self._held[: self.sizes.held]
        return log_likelihood(model, images_seen(model, inputs, held), self._classes("tinyimagenet", held, inputs))

    def ask(self, model: DualEncoder, inputs: FeatureSource) -> dict[str, Answer]:
        """By name, ``zero-shot/tinyimagenet/top5`` and the like."""
        test, objects = self._test[: self.sizes.test], self._objects[: self.sizes.objects]
        answers = {}
        for name, pairs in (("tinyimagenet", test), ("cifar10", objects)):
            seen = images_seen(model, inputs, pairs)
            found = zero_shot(model, seen, self._classes(name, pairs, inputs))
            answers |= {f"zero-shot/{name}/{key}": value for key, value in found.items()}
        to_fit = self._objects_to_fit[: self.sizes.objects_to_fit]
        labels = [{pair.id: int(pair.meta["label"]) for pair in pairs} for pairs in (to_fit, objects)]
        found = probed(images_seen(model, inputs, to_fit), labels[0], seen, labels[1])
        answers |= {f"kept/cifar10/{key}": value for key, value in found.items()}
        return answers | self._ask_scenes(model, inputs)

    def _ask_scenes(self, model: DualEncoder, inputs: FeatureSource) -> dict[str, Answer]:
        scenes = list(self._scenes)
        more = scenes + list(self._more_scenes[: max(0, self.sizes.scenes - len(scenes))])
        photo = {caption.text: pair.id for pair in more for caption in pair.captions}
        texts = texts_seen(model, inputs, photo)
        ids = {f"{pair.id}#{n}": (text, pair.id) for pair in scenes for n, (text, _) in enumerate(pair.captions)}
        pooled = PooledFeatures(texts.of(text for text, _ in ids.values()).to(next(model.parameters()).device))
        question = RetrievalQueries(
            image_groups={pair.id: pair.id for pair in scenes},
            text_groups={name: photo_id for name, (_, photo_id) in ids.items()},
            texts=lambda: [(list(ids), pooled)],
        )
        found = retrieval(model, images_seen(model, inputs, self._scenes), question)
        answers = {f"retrieval/flickr8k/{key}": value for key, value in found.items()}
        return answers | {"kept/flickr8k/sentences": sentences(texts, photo)}

    def _classes(self, name: str, pairs: Pairs, inputs: FeatureSource) -> ZeroShotQueries:
        lines = self._lines(name, "zeroshot_classification_templates.txt")
        classes = self._lines(name, "classnames.txt")
        return ZeroShotQueries(
            labels={pair.id: str(pair.meta["class"]) for pair in pairs},
            classes=classes[::EVERY] if name == "tinyimagenet" else classes,
            templates=lines,
            read=inputs.read,
        )

    # --- the files -----------------------------------------------------------------------------------------------

    def _lines(self, name: str, file: str) -> list[str]:
        lines = (self.folder / name / file).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]

    def _open(self, name: str) -> Pairs:
        return open_pairs(f"{self.folder}/{name}")

    def _tiny(self, name: str) -> Pairs:
        """Of the classes in the study; photos of one class are one group, so that none is another's negative."""
        pairs = open_pairs(f"{self.folder}/tinyimagenet/{name}", columns=ColumnNames(group="wnid"))
        classes = set(self._lines("tinyimagenet", "classnames.txt")[::EVERY])
        return pairs.subset(row for row in range(len(pairs)) if pairs[row].meta["class"] in classes)

    @cached_property
    def _train(self) -> Pairs:
        """Training photos that train; a caption is a template around a name of the class."""
        return self._tiny("tinyimagenet-train-{00..03}.tar")

    @cached_property
    def _held(self) -> Pairs:
        """Training photos on which settings are chosen."""
        return self._tiny("tinyimagenet-train-04.tar")

    @cached_property
    def _first(self) -> Pairs:
        """Training photos that heads start from."""
        return self._tiny("tinyimagenet-train-05.tar")

    @cached_property
    def _test(self) -> Pairs:
        return self._tiny("tinyimagenet-val.tar")

    @cached_property
    def _objects(self) -> Pairs:
        return self._open("cifar10/cifar10-test.tar")

    @cached_property
    def _objects_to_fit(self) -> Pairs:
        return self._open("cifar10/cifar10-train.tar")

    @cached_property
    def _scenes(self) -> Pairs:
        return self._open("flickr8k-sample/flickr8k-sample-val.tar")

    @cached_property
    def _more_scenes(self) -> Pairs:
        return self._open("flickr8k-sample/flickr8k-sample-train.tar")
