"""The world of claims 1, 2, 3 and 5: small photos, their training splits, and the evaluation of a trained model.

Input: the folder of the photos (webdataset shards, described in its README). Output: pairs, initial heads and answers
for ``cells``. Note: training photos are in three disjoint splits. Heads are initialised on the first, towers and heads
are trained on the second, learning rates are selected on the third. So the heads have not been fitted to the training
photos, and the first gradients are informative. Each seed samples its own training photos.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Literal

import numpy as np
from studies.evaluation import (
    Answer,
    Seen,
    images_seen,
    log_likelihood,
    probed,
    retrieval,
    sentences,
    texts_seen,
    zero_shot,
)
from studies.lilt.initial_heads import Rows, Start, closed_form

from clasp.config.build import ModelAndPreprocessing
from clasp.config.recipe import Recipe, read_recipe
from clasp.data.pairs import ColumnNames, Pairs, open_pairs
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.zeroshot import ZeroShotQueries
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.plain_types import Precision
from clasp.types import PooledFeatures, UserError


def drawn(pairs: Pairs, count: int, seed: int) -> Pairs:
    """``count`` pairs sampled with a seed; smaller samples are subsets of larger ones."""
    if count > len(pairs):
        raise UserError(f"{pairs.name}: {count} pairs are asked for, and there are {len(pairs)}")
    return pairs.subset(np.random.Generator(np.random.PCG64(seed)).permutation(len(pairs))[:count])


FILE = Path(__file__).with_name("photos.toml")
FILE_8000 = Path(__file__).with_name("photos-8000.toml")


@dataclass(frozen=True)
class Sizes:
    """Numbers of photos to evaluate on."""

    held: int
    test: int
    objects: int
    objects_to_fit: int
    scenes: int
    """Photos whose captions are compared with each other; those of Flickr8k's small validation split come first."""


SMALL = Sizes(held=480, test=1200, objects=500, objects_to_fit=300, scenes=200)
WHOLE = Sizes(held=2000, test=2400, objects=1000, objects_to_fit=2000, scenes=900)


@dataclass(frozen=True)
class Photos:
    """Classes of Tiny-ImageNet (training and evaluation); CIFAR-10 and Flickr8k (evaluation only).

    ``every``: of the classes, one in so many; with half of them a short run has twice as many photos of a class.
    """

    folder: Path
    sizes: Sizes = SMALL
    ridge: tuple[float, float] = (1.0, 1.0)
    file: Path = FILE
    every: int = 2

    @property
    def recipe(self) -> Recipe:
        """The common recipe of all rows."""
        return read_recipe(self.file)

    # --- training ------------------------------------------------------------------------------------------------

    def pairs(self, count: int, seed: int) -> tuple[Pairs, Pairs]:
        """Training pairs; and a few for the validation at the end of the run, which is not used here."""
        return drawn(self._train, count, seed), self._held[:64]

    def start(self, parts: ModelAndPreprocessing, inputs: FeatureSource, *pairs: Pairs) -> Start:
        """Closed-form heads for the towers in ``parts``, from these pairs together."""
        first, *others = (self._rows(parts, inputs, each) for each in pairs)
        rows = reduce(Rows.and_those_of, others, first)
        held = self._rows(parts, inputs, self._held[:256])
        return closed_form(rows, held, width=self.recipe.head.width, ridge=self.ridge)

    def _rows(self, parts: ModelAndPreprocessing, inputs: FeatureSource, pairs: Pairs) -> Rows:
        said = [pair.captions[0].text for pair in pairs]
        images, texts = self._images(parts.model, inputs, pairs), self._texts(parts.model, inputs, said)
        return Rows(images.of(pair.id for pair in pairs), texts.of(said), tuple(said))

    def _images(self, model: DualEncoder, inputs: FeatureSource, pairs: Pairs) -> Seen:
        return images_seen(model, inputs, pairs, self._precision)

    def _texts(self, model: DualEncoder, inputs: FeatureSource, texts: Iterable[str]) -> Seen:
        return texts_seen(model, inputs, texts, self._precision)

    @cached_property
    def _precision(self) -> Precision:
        """The precision of features: that of training, named in the recipe of every size."""
        precision = self.recipe.train.precision
        assert precision != "auto"
        return precision

    # --- evaluation ----------------------------------------------------------------------------------------------

    def validate(self, model: DualEncoder, inputs: FeatureSource) -> float:
        """The learning rate selection metric: log-likelihood of the correct class on held-out photos."""
        held = self._held[: self.sizes.held]
        return log_likelihood(model, self._images(model, inputs, held), self._classes("tinyimagenet", held, inputs))

    def ask(self, model: DualEncoder, inputs: FeatureSource) -> dict[str, Answer]:
        """Answers by name, such as ``zero-shot/tinyimagenet/top5``."""
        test, objects = self._test[: self.sizes.test], self._objects[: self.sizes.objects]
        answers = {}
        for name, pairs in (("tinyimagenet", test), ("cifar10", objects)):
            seen = self._images(model, inputs, pairs)
            found = zero_shot(model, seen, self._classes(name, pairs, inputs))
            answers |= {f"zero-shot/{name}/{key}": value for key, value in found.items()}
        to_fit = self._objects_to_fit[: self.sizes.objects_to_fit]
        labels = [{pair.id: int(pair.meta["label"]) for pair in pairs} for pairs in (to_fit, objects)]
        found = probed(self._images(model, inputs, to_fit), labels[0], seen, labels[1])
        answers |= {f"kept/cifar10/{key}": value for key, value in found.items()}
        return answers | self._ask_scenes(model, inputs)

    def classify(
        self, part: Literal["validation", "test"], model: DualEncoder, inputs: FeatureSource
    ) -> tuple[dict[str, Answer], float]:
        """Zero-shot ``tinyimagenet/top1``, ``cifar10/top1`` and so on, and the log-likelihood of the correct class of
        Tiny-ImageNet; validation photos are those that neither train nor are in a test set."""
        asked = {
            "validation": (self._held[: self.sizes.held], self._objects_to_fit[: self.sizes.objects_to_fit]),
            "test": (self._test[: self.sizes.test], self._objects[: self.sizes.objects]),
        }[part]
        answers, likelihoods = {}, []
        for name, pairs in zip(("tinyimagenet", "cifar10"), asked, strict=True):
            seen, question = self._images(model, inputs, pairs), self._classes(name, pairs, inputs)
            answers |= {f"{name}/{key}": value for key, value in zero_shot(model, seen, question).items()}
            likelihoods.append(log_likelihood(model, seen, question))
        return answers, likelihoods[0]

    def _ask_scenes(self, model: DualEncoder, inputs: FeatureSource) -> dict[str, Answer]:
        scenes = list(self._scenes)
        more = scenes + list(self._more_scenes[: max(0, self.sizes.scenes - len(scenes))])
        photo = {caption.text: pair.id for pair in more for caption in pair.captions}
        texts = self._texts(model, inputs, photo)
        ids = {f"{pair.id}#{n}": (text, pair.id) for pair in scenes for n, (text, _) in enumerate(pair.captions)}
        pooled = PooledFeatures(texts.of(text for text, _ in ids.values()).to(next(model.parameters()).device))
        question = RetrievalQueries(
            image_groups={pair.id: pair.id for pair in scenes},
            text_groups={name: photo_id for name, (_, photo_id) in ids.items()},
            texts=lambda: [(list(ids), pooled)],
        )
        found = retrieval(model, self._images(model, inputs, self._scenes), question)
        answers = {f"retrieval/flickr8k/{key}": value for key, value in found.items()}
        return answers | {"kept/flickr8k/sentences": sentences(texts, photo)}

    def _classes(self, name: str, pairs: Pairs, inputs: FeatureSource) -> ZeroShotQueries:
        lines = self._lines(name, "zeroshot_classification_templates.txt")
        classes = self._lines(name, "classnames.txt")
        return ZeroShotQueries(
            labels={pair.id: str(pair.meta["class"]) for pair in pairs},
            classes=classes[:: self.every] if name == "tinyimagenet" else classes,
            templates=lines,
            read=inputs.read,
        )

    # --- files ---------------------------------------------------------------------------------------------------

    def _lines(self, name: str, file: str) -> list[str]:
        lines = (self.folder / name / file).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]

    def _open(self, name: str) -> Pairs:
        return open_pairs(f"{self.folder}/{name}")

    def _tiny(self, name: str) -> Pairs:
        """Pairs of the classes in the study; photos of one class are one group, so that they are not negatives."""
        pairs = open_pairs(f"{self.folder}/tinyimagenet/{name}", columns=ColumnNames(group="wnid"))
        classes = set(self._lines("tinyimagenet", "classnames.txt")[:: self.every])
        return pairs.subset(row for row in range(len(pairs)) if pairs[row].meta["class"] in classes)

    @cached_property
    def _train(self) -> Pairs:
        """Training pairs; a caption is a template with a name of the class."""
        return self._tiny("tinyimagenet-train-{00..03}.tar")

    @cached_property
    def _held(self) -> Pairs:
        """Held-out training photos for selecting hyperparameters."""
        return self._tiny("tinyimagenet-train-04.tar")

    @cached_property
    def outside(self) -> Pairs:
        """Training photos for initialising heads only."""
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
