"""Training and evaluation data of the rows: small photos of ten classes, and drawings with their English names.

Input: the folders of the photos and of the emoji corpus. Output: pairs and answers. Note: a cell repeats each pair as
often as its steps need, in an order drawn from its seed, as a single epoch, so that the number of steps is exact.
Drawings are evaluated in a held-out style; their concepts are trained on, since encoders trained from scratch have no
other knowledge. Few classes and concepts, repeated often: with more of either, all rows stay at chance within the
compute of two cores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from studies.evaluation import Answer, images_seen, log_likelihood, retrieval, zero_shot
from studies.lilt.emoji_names import STYLE_TO_ASK, STYLE_TO_CHOOSE, STYLES, Names

from clasp.data.pairs import Pairs, open_pairs
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.zeroshot import ZeroShotQueries
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.types import Caption

EVERY = 3  # every third training concept of the corpus is in the study


@dataclass(frozen=True)
class World:
    """CIFAR-10 and the emoji corpus."""

    photos: Path
    emoji: Path
    held: int = 300
    """Training photos held out for learning rate selection"""

    def pairs(self, count: int, seed: int) -> tuple[Pairs, Pairs]:
        """``count`` training pairs, each pair of the corpus once before any repeats; and a few for validation."""
        every, rng = self._train, np.random.Generator(np.random.PCG64(seed))
        turns = [rng.permutation(len(every)) for _ in range(-(-count // len(every)))]
        return every.subset(np.concatenate(turns)[:count]), self._photos[: self.held][:64]

    @property
    def different(self) -> int:
        """Number of unique training pairs."""
        return len(self._train)

    @property
    def asked_drawings(self) -> Pairs:
        """A drawing of each concept in the style that never trains, with its name."""
        return self._drawings([STYLE_TO_ASK])

    # --- evaluation ----------------------------------------------------------------------------------------------

    def validate(self, model: DualEncoder, inputs: FeatureSource) -> float:
        """Selection metric: log-likelihood of the correct class on held-out photos and of the correct name on drawings
        in a held-out style, equally weighted; higher is better."""
        held, drawings = self._photos[: self.held], self._drawings([STYLE_TO_CHOOSE])
        names = {pair.id: pair.captions[0].text for pair in drawings}
        named = ZeroShotQueries(labels=names, classes=sorted(set(names.values())), templates=["{}"], read=inputs.read)
        asked = ((held, self._classes(held, inputs)), (drawings, named))
        return sum(log_likelihood(model, images_seen(model, inputs, pairs), question) for pairs, question in asked)

    def ask(self, model: DualEncoder, inputs: FeatureSource) -> dict[str, Answer]:
        """``photos/top1``, ``drawings/recall@1`` and ``drawings/recall@5`` (drawing to name)."""
        test, drawings = self._test, self.asked_drawings
        found = zero_shot(model, images_seen(model, inputs, test), self._classes(test, inputs))
        names = {str(pair.group): pair.captions[0].text for pair in drawings}
        question = RetrievalQueries(
            image_groups={pair.id: str(pair.group) for pair in drawings},
            text_groups={concept: concept for concept in names},
            texts=inputs.texts(names),
            directions=("image_to_text",),
        )
        named = retrieval(model, images_seen(model, inputs, drawings), question)
        return {"photos/top1": found["top1"]} | {
            f"drawings/{key.rpartition('/')[2]}": value for key, value in named.items()
        }

    def _classes(self, pairs: Pairs, inputs: FeatureSource) -> ZeroShotQueries:
        labels = {pair.id: str(pair.meta["class"]) for pair in pairs}
        return ZeroShotQueries(
            labels=labels, classes=self._lines("classnames.txt"), templates=self._templates, read=inputs.read
        )

    # --- files ---------------------------------------------------------------------------------------------------

    def _lines(self, file: str) -> list[str]:
        lines = (self.photos / "cifar10" / file).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]

    @cached_property
    def _templates(self) -> list[str]:
        return self._lines("zeroshot_classification_templates.txt")

    def _drawings(self, styles: list[str]) -> Pairs:
        return self._names.drawings(self._names.concepts("train")[::EVERY], styles, ["en"])

    @cached_property
    def _names(self) -> Names:
        return Names(self.emoji)

    @cached_property
    def _photos(self) -> Pairs:
        """Training photos with one caption per template; photos of a class are one group, so that they are not
        negatives."""
        pairs = []
        for pair in open_pairs(f"{self.photos}/cifar10/cifar10-train.tar"):
            name = str(pair.meta["class"])
            captions = tuple(Caption(template.replace("{c}", name), "en") for template in self._templates)
            pairs.append(replace(pair, captions=captions, group=name))
        return Pairs("photos", [pairs])

    @cached_property
    def _train(self) -> Pairs:
        return Pairs("photos and drawings", [self._photos[self.held :], self._drawings([*STYLES])])

    @cached_property
    def _test(self) -> Pairs:
        return open_pairs(f"{self.photos}/cifar10/cifar10-test.tar")
