"""Classes of a classifier as concepts: names, definitions and broader terms, from WordNet 3.0 or from labels.

Input: the packaged table of ImageNet-1k that ``dev/wordnet_classes.py`` writes; WordNet ids or labels of other
classifiers. Output: ``Concept``s for the outputs of a classifier (the 1,000 of ImageNet-1k in the order of ILSVRC
2012), and for the terms above them. Note: terms above more than ``MOST_CLASSES`` classes ("whole", "entity") describe
no picture and are left out; so are those above one class only.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from clasp.models.concepts import Concept, single_class_concepts

IMAGENET_SOURCE = "ImageNet-1k, WordNet 3.0"
MOST_CLASSES = 600
"""Classes below the broadest terms that are used"""


@functools.cache
def _table() -> dict[str, Any]:
    content = (files("clasp.models.zoo") / "files" / "imagenet-wordnet.json.gz").read_bytes()
    return json.loads(gzip.decompress(content))


def imagenet_concepts() -> tuple[Concept, ...]:
    """The 1,000 classes in the order of a classifier's outputs, then the broader terms."""
    classes = _table()["classes"]
    rows = [_table()["synsets"][synset] for synset in classes]
    return wordnet_concepts(classes, [row["names"] for row in rows], [row["definition"] for row in rows])


def wordnet_concepts(
    synsets: Sequence[str], names: Sequence[Sequence[str]], definitions: Sequence[str]
) -> tuple[Concept, ...]:
    """Classes given by their WordNet 3.0 ids, in the order of a classifier's outputs, then the broader terms.

    Broader are those terms of the packaged table that lie above two classes or more. It has no links of synsets that
    are neither classes of ImageNet-1k nor above one.
    """
    below: dict[str, list[int]] = {}
    for place, synset in enumerate(synsets):
        for term in _above(synset):
            below.setdefault(term, []).append(place)
    single = set(synsets)
    broader = [
        _concept(synset, places)
        for synset, places in sorted(below.items())
        if synset not in single and 2 <= len(places) <= MOST_CLASSES
    ]
    return (*single_class_concepts(names, definitions), *broader)


def concepts_of_labels(labels: Sequence[str]) -> tuple[tuple[Concept, ...], str]:
    """Classes given by labels, and where their names are from.

    Synonyms in a label are separated by commas ("tench, Tinca tinca"). The labels of ImageNet-1k give the concepts of
    the packaged table, also after a class for the background (MobileNet), which is left out.
    """
    names = [[part.strip() for part in label.replace("_", " ").split(",") if part.strip()] for label in labels]
    first = [each[0] for each in names]
    after = int(first[0].lower() == "background")
    if is_imagenet(first[after:]):
        shifted = [
            replace(concept, classes=tuple(place + after for place in concept.classes))
            for concept in imagenet_concepts()
        ]
        return tuple(shifted), IMAGENET_SOURCE
    return single_class_concepts(names, [""] * len(names)), "labels of the checkpoint"


def are_names(labels: Sequence[str]) -> bool:
    """Whether labels name classes; numbers, as in ``LABEL_0``, do not."""
    return all(re.fullmatch(r"(label|class)?[_ ]?\d*", label.strip(" ,"), re.IGNORECASE) is None for label in labels)


def is_imagenet(first_names: list[str]) -> bool:
    """Whether these are the first names of ImageNet-1k's classes, in their order; a few may be spelled otherwise."""
    ours = [_table()["synsets"][synset]["names"] for synset in _table()["classes"]]
    if len(first_names) != len(ours):
        return False
    known = [{name.lower() for name in names} for names in ours]
    return sum(name.lower() in names for name, names in zip(first_names, known, strict=True)) >= 0.9 * len(ours)


def _above(synset: str) -> set[str]:
    """All broader terms of a synset; none where the table does not have it."""
    found: set[str] = set()
    todo = [synset] if synset in _table()["synsets"] else []
    while todo:
        new = set(_table()["synsets"][todo.pop()]["broader"]) - found
        found |= new
        todo += new
    return found


def _concept(synset: str, places: list[int]) -> Concept:
    row = _table()["synsets"][synset]
    return Concept(tuple(row["names"]), tuple(places), row["definition"])
