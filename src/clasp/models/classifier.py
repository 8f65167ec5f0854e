"""The classifier that an image tower was pre-trained with, as data: a weight vector of each class, and what it names.

Input: the weights of the last linear layer and the names of its outputs. Output: ``Classifier``; ``class_pairs`` makes
image-text pairs of it without any image. Note: a broader concept ("bird") has the mean of its classes' vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.models.concepts import Concept

ClassifierPooling = Literal["cls", "mean", "cls+mean"]


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of pooled features, and the concepts that its outputs stand for."""

    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    concepts: tuple[Concept, ...]
    pool: ClassifierPooling
    """The pooling of the last hidden states that it reads"""
    source: str
    """Where its names are from"""


@dataclass(frozen=True)
class ClassPairs:
    """Image-text pairs of a classifier: the vector of a concept, and one of its names or its definition."""

    vectors: Float[Tensor, "K D"]
    """One of each concept, centred over the classes; the vectors of the classes have mean length 1"""
    concepts: tuple[Concept, ...]
    concept: Int[Tensor, " n"]
    """The concept of each pair, an index of ``concepts``"""
    texts: tuple[str, ...]
    weight: Float[Tensor, " n"]
    classes: int
    """Number of classes"""


def class_pairs(classifier: Classifier) -> ClassPairs:
    """The class pairs of a classifier.

    The k-th synonym (from 0) counts 1 / (1 + k), the definition of a class counts 1. Definitions are used of single
    classes only; those of broader concepts made no difference (``dev/LOG.md``).
    """
    vectors = classifier.weight.float() - classifier.weight.float().mean(0)
    vectors = vectors / vectors.norm(dim=1).mean().clamp(min=1e-12)
    concepts = classifier.concepts
    numbers: list[int] = []
    texts: list[str] = []
    weights: list[float] = []
    for number, concept in enumerate(concepts):
        named = [(name, 1 / (1 + place)) for place, name in enumerate(concept.names)]
        defined = [(concept.definition, 1.0)] if concept.definition and len(concept.classes) == 1 else []
        for text, weight in (*named, *defined):
            numbers.append(number)
            texts.append(text)
            weights.append(weight)
    means = torch.stack([vectors[list(concept.classes)].mean(0) for concept in concepts])
    return ClassPairs(means, concepts, torch.tensor(numbers), tuple(texts), torch.tensor(weights), len(vectors))


def classifier_columns(classifier: Classifier, pool: str, pooled_width: int) -> slice | None:
    """The columns of pooled last hidden states that the classifier reads; ``None`` where ``pool`` has others."""
    half = pooled_width // 2
    columns = {
        ("cls", "cls"): slice(0, pooled_width),
        ("mean", "mean"): slice(0, pooled_width),
        ("cls+mean", "cls+mean"): slice(0, pooled_width),
        ("cls", "cls+mean"): slice(0, half),
        ("mean", "cls+mean"): slice(half, pooled_width),
        ("mean", "mean+max"): slice(0, half),
    }.get((classifier.pool, pool))
    if columns is None or columns.stop - columns.start != classifier.weight.shape[1]:
        return None
    return columns
