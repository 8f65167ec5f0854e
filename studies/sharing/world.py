"""What the rows train on and are asked: small photos of 160 classes, and drawings with their English names.

In: the folders of the photos and of the emoji corpus. Out: pairs and answers. Unusual: a cell sees each pair as often
as its steps need, in an order drawn for its seed, and calls that one epoch; so steps can be set to the unit. Drawings
are asked about in a style that never trains; their concepts do train, since nets from scratch know no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from studies.asking import Answer, images_seen, log_likelihood, retrieval, zero_shot
from studies.lilt.names import STYLE_TO_ASK, STYLES, Names

from clasp.data.pairs import Columns, Pairs, open_pairs
from clasp.evaluate.questions import Captions, Classes
from clasp.inputs import Inputs
from clasp.model import DualEncoder


@dataclass(frozen=True)
class World:
    """Tiny-ImageNet and the emoji corpus."""

    photos: Path
    emoji: Path
    held: int = 1000
    """Photos that choose learning rates"""

    def pairs(self, count: int, seed: int) -> tuple[Pairs, Pairs]:
        """To train on: as many as asked for, every pair of the corpus once before any comes again; and a few more."""
        every, rng = self._train, np.random.Generator(np.random.PCG64(seed))
        turns = [rng.permutation(len(every)) for _ in range(-(-count // len(every)))]
        return every.subset(np.concatenate(turns)[:count]), self._held[:64]

    @property
    def different(self) -> int:
        """Pairs there are to train on."""
        return len(self._train)

    # --- what is asked -------------------------------------------------------------------------------------------

    def validate(self, model: DualEncoder, inputs: Inputs) -> float:
        """How likely the right class is on photos held out of training; more is better."""
        held = self._held[: self.held]
        return log_likelihood(model, images_seen(model, inputs, held), self._classes(held, inputs))

    def ask(self, model: DualEncoder, inputs: Inputs) -> dict[str, Answer]:
        """``photos/top1``, ``photos/top5`` and ``drawings/recall@1``, ``drawings/recall@5`` (a drawing asks)."""
        test = self._test
        found = zero_shot(model, images_seen(model, inputs, test), self._classes(test, inputs))
        drawings = self._drawings([STYLE_TO_ASK])
        names = {pair.group: pair.captions[0].text for pair in drawings}
        question = Captions(
            image_groups={pair.id: str(pair.group) for pair in drawings},
            text_groups={str(concept): str(concept) for concept in names},
            texts=inputs.texts({str(concept): name for concept, name in names.items()}),
            parts=("image_to_text",),
        )
        named = retrieval(model, images_seen(model, inputs, drawings), question)
        return {f"photos/{key}": value for key, value in found.items()} | {
            f"drawings/{key.rpartition('/')[2]}": value for key, value in named.items()
        }

    def _classes(self, pairs: Pairs, inputs: Inputs) -> Classes:
        lines = self._lines("zeroshot_classification_templates.txt")
        labels = {pair.id: str(pair.meta["class"]) for pair in pairs}
        return Classes(labels=labels, classes=self._lines("classnames.txt"), templates=lines, read=inputs.read)

    # --- the files -----------------------------------------------------------------------------------------------

    def _lines(self, file: str) -> list[str]:
        lines = (self.photos / "tinyimagenet" / file).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]

    def _tiny(self, name: str) -> Pairs:
        """Photos of one class are one group, so that none is another's negative."""
        return open_pairs(f"{self.photos}/tinyimagenet/{name}", columns=Columns(group="wnid"))

    def _drawings(self, styles: list[str]) -> Pairs:
        return self._names.drawings(self._names.concepts("train"), styles, ["en"])

    @cached_property
    def _names(self) -> Names:
        return Names(self.emoji)

    @cached_property
    def _train(self) -> Pairs:
        return Pairs("photos and drawings", [self._tiny("tinyimagenet-train-{00..03}.tar"), self._drawings([*STYLES])])

    @cached_property
    def _held(self) -> Pairs:
        return self._tiny("tinyimagenet-train-04.tar")

    @cached_property
    def _test(self) -> Pairs:
        return self._tiny("tinyimagenet-val.tar")
