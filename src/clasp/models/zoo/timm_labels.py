"""Names of the classes of timm's classifiers: from the checkpoint's configuration, else from timm's ImageNet tables.

Input: the pretrained configuration of a net and the number of its outputs. Output: ``NamedOutputs``, or ``None`` where
the outputs have no names. Note: as in timm, a table is found by the number of outputs (1,000; 11,221; 11,821; 21,841;
21,842; 21,843), so a net of one's own with as many other classes is taken for ImageNet; the source is reported.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from clasp.models.concepts import Concept
from clasp.models.zoo.imagenet import (
    IMAGENET_SOURCE,
    are_names,
    concepts_of_labels,
    imagenet_concepts,
    wordnet_concepts,
)


@dataclass(frozen=True, slots=True)
class NamedOutputs:
    """What the outputs of a classifier stand for, and where the names are from."""

    concepts: tuple[Concept, ...]
    source: str


def timm_concepts(cfg: Mapping[str, Any], outputs: int) -> NamedOutputs | None:
    """The concepts of a classifier with ``outputs`` classes; ``None`` where they have no names."""
    labels = _own_labels(cfg.get("label_names"), outputs)
    if labels is not None:
        if all(re.fullmatch(r"n\d{8}", label) for label in labels):
            return _of_synsets(labels, f"{outputs:,} WordNet synsets of the checkpoint")
        return NamedOutputs(*concepts_of_labels(labels)) if are_names(labels) else None
    subset = infer_imagenet_subset({"num_classes": outputs})
    if subset is None:
        return None
    if subset == "imagenet-1k":
        return NamedOutputs(imagenet_concepts(), IMAGENET_SOURCE)
    return _of_synsets(ImageNetInfo(subset).label_names(), f"{subset} by the number of outputs, timm's names")


def _own_labels(labels: Any, outputs: int) -> list[str] | None:
    """The labels of a configuration, a list or numbered from 0, where there is one of each output."""
    if isinstance(labels, Mapping):
        numbered = {int(number): label for number, label in labels.items()}
        labels = [numbered[number] for number in sorted(numbered)] if set(numbered) == set(range(outputs)) else None
    return [str(label) for label in labels] if labels and len(labels) == outputs else None


def _of_synsets(synsets: list[str], source: str) -> NamedOutputs | None:
    """Names and definitions of timm's table; ``None`` where it lacks a synset."""
    info = ImageNetInfo("imagenet-1k")
    try:
        names = [info.label_name_to_description(synset) for synset in synsets]
        detailed = [info.label_name_to_description(synset, detailed=True) for synset in synsets]
    except KeyError:
        return None
    definitions = [full.removeprefix(f"{name}: ").split(";")[0] for name, full in zip(names, detailed, strict=True)]
    return NamedOutputs(wordnet_concepts(synsets, [name.split(", ") for name in names], definitions), source)
