"""Concepts: what the outputs of a classifier name, in words and without weights.

Input: names and definitions. Output: ``Concept``s. Note: nothing here imports torch, since the background captions of a
search are names of concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Concept:
    """What some classes have in common: one class, or all below a broader term."""

    names: tuple[str, ...]
    """Synonyms, the most usual one first"""
    classes: tuple[int, ...]
    """Outputs of the classifier"""
    definition: str = ""


def single_class_concepts(names: Sequence[Sequence[str]], definitions: Sequence[str]) -> tuple[Concept, ...]:
    """One concept a class, from synonyms and a definition ("" for none) of each."""
    rows = zip(names, definitions, strict=True)
    return tuple(Concept(tuple(synonyms), (place,), definition) for place, (synonyms, definition) in enumerate(rows))
