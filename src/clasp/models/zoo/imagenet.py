"""ImageNet-1k's classes as concepts: names, definitions and broader terms, from WordNet 3.0.

Input: the packaged table that ``dev/wordnet_classes.py`` writes. Output: ``Concept``s for the 1,000 outputs of a
classifier in the order of ILSVRC 2012, and for the terms above them. Note: terms above more than ``MOST_CLASSES``
classes ("artifact", "whole") say nothing of a picture and are left out; so are those above one class only.
"""

from __future__ import annotations

import functools
import gzip
import json
from importlib.resources import files
from typing import Any

from clasp.models.classifier import Concept

MOST_CLASSES = 600
"""Classes below the broadest terms that are used"""


@functools.cache
def _table() -> dict[str, Any]:
    content = (files("clasp.models.zoo") / "files" / "imagenet-wordnet.json.gz").read_bytes()
    return json.loads(gzip.decompress(content))


def imagenet_concepts() -> tuple[Concept, ...]:
    """The 1,000 classes in the order of a classifier's outputs, then the broader terms."""
    table = _table()
    below: dict[str, list[int]] = {}
    for place, synset in enumerate(table["classes"]):
        for term in _above(synset):
            below.setdefault(term, []).append(place)
    classes = [_concept(synset, [place]) for place, synset in enumerate(table["classes"])]
    single = set(table["classes"])
    broader = [
        _concept(synset, places)
        for synset, places in sorted(below.items())
        if synset not in single and 2 <= len(places) <= MOST_CLASSES
    ]
    return (*classes, *broader)


def is_imagenet(first_names: list[str]) -> bool:
    """Whether these are the first names of ImageNet-1k's classes, in their order; a few may be spelled otherwise."""
    ours = [_table()["synsets"][synset]["names"] for synset in _table()["classes"]]
    if len(first_names) != len(ours):
        return False
    known = [{name.lower() for name in names} for names in ours]
    return sum(name.lower() in names for name, names in zip(first_names, known, strict=True)) >= 0.9 * len(ours)


def _above(synset: str) -> set[str]:
    """All broader terms of a synset."""
    found: set[str] = set()
    todo = [synset]
    while todo:
        new = set(_table()["synsets"][todo.pop()]["broader"]) - found
        found |= new
        todo += new
    return found


def _concept(synset: str, places: list[int]) -> Concept:
    row = _table()["synsets"][synset]
    return Concept(tuple(row["names"]), tuple(places), row["definition"])
