"""Pairs made into the questions that are put to a model: which caption, in which language, which class.

In go pairs and the ``Inputs`` of a model, out come evaluations, for validation while training and for ``clasp eval``
alike. Unusual: what is asked of a validation part is read off its pairs. Where every caption is the name of a class,
retrieval would ask which of many equal captions is meant, so these pairs are classified instead; where captions are in
several languages, each language is asked apart, so that a picture's names in one do not crowd out those in another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from clasp.data.pairs import Pairs
from clasp.evaluation.queries import Captions, Classes, Direction
from clasp.evaluation.tasks import Multilingual, Retrieval, ZeroShot
from clasp.models.features import Inputs
from clasp.types import Pair

BOTH_WAYS: tuple[Direction, ...] = ("image_to_text", "text_to_image")


def validation(train: Pairs, val: Pairs, inputs: Inputs) -> Retrieval | Multilingual | ZeroShot:
    """What decides between the weights of a run: retrieval, the mean of it over several languages, or the class where
    captions are class names."""
    if not all(_only_class(pair) for pair in val):
        languages = languages_of(val)
        if len(languages) > 1:
            return multilingual(val, inputs, languages=languages, data="validation")
        return retrieval(val, inputs, data="validation")
    classes = sorted({caption.text for pairs in (train, val) for pair in pairs for caption in pair.captions})
    return zeroshot(val, inputs, classes=classes, templates=["{}"], data="validation")


def _only_class(pair: Pair) -> bool:
    return [caption.text for caption in pair.captions] == [pair.meta.get("class")]


def zeroshot(
    pairs: Pairs, inputs: Inputs, *, classes: Sequence[str], templates: Sequence[str], data: str, label: str = "class"
) -> ZeroShot:
    """Which class an image is: that in ``label`` of its pair's meta."""
    labels = {pair.id: str(pair.meta[label]) for pair in pairs}
    question = Classes(labels=labels, classes=classes, templates=templates, read=inputs.read)
    return ZeroShot(data=data, images=inputs.images(pairs), question=question)


def retrieval(pairs: Pairs, inputs: Inputs, *, data: str) -> Retrieval:
    """Captions by image and images by caption, over all captions of ``pairs``."""
    listed = list(pairs)
    captions = {f"{pair.id}#{n}": (text, pair.group) for pair in listed for n, (text, _) in enumerate(pair.captions)}
    question = Captions(
        image_groups={pair.id: pair.group for pair in listed},
        text_groups={key: group for key, (_, group) in captions.items()},
        texts=inputs.texts({key: text for key, (text, _) in captions.items()}),
    )
    return Retrieval(data=data, images=inputs.images(pairs), question=question)


def multilingual(pairs: Pairs, inputs: Inputs, *, languages: Sequence[str], data: str) -> Multilingual:
    """Retrieval in each language, and the mean over them."""
    inputs.read_ahead(caption.text for pair in pairs for caption in pair.captions if caption.language in languages)
    return Multilingual(
        data=data,
        images=inputs.images(pairs),
        questions={language: by_language(pairs, language, inputs) for language in languages},
        primary="macro:all/mean_recall",
        sets={"all": languages},
    )


def by_language(
    pairs: Sequence[Pair], language: str, inputs: Inputs, parts: Sequence[Direction] = BOTH_WAYS
) -> Captions:
    """The captions of ``pairs`` in one language, each distinct caption of a group once."""
    texts: dict[str, tuple[str, str]] = {}
    for pair in pairs:
        for caption in pair.captions:
            if caption.language == language:
                texts.setdefault(f"{pair.group}|{caption.text}", (caption.text, pair.group))
    return Captions(
        image_groups={pair.id: pair.group for pair in pairs},
        text_groups={key: group for key, (_, group) in texts.items()},
        texts=inputs.texts({key: text for key, (text, _) in texts.items()}),
        parts=tuple(parts),
    )


def languages_of(pairs: Iterable[Pair]) -> list[str]:
    """The languages that captions name."""
    return sorted({caption.language for pair in pairs for caption in pair.captions} - {""})
