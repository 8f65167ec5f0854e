"""A classifier as data: its concepts and the pairs made of them, by hand, and the packaged table of ImageNet."""

from __future__ import annotations

import pytest
import torch

from clasp.models.classifier import Classifier, class_pairs, classifier_columns
from clasp.models.concepts import Concept, single_class_concepts
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings
from clasp.models.zoo.imagenet import (
    MOST_CLASSES,
    are_names,
    concepts_of_labels,
    imagenet_concepts,
    is_imagenet,
    wordnet_concepts,
)
from clasp.models.zoo.registry import load_backbone


def test_class_pairs_by_hand():
    weight = torch.tensor([[4.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    concepts = (
        *single_class_concepts([["cat", "Felis catus"], ["dog"], ["sky"]], ["a pet", "", ""]),
        Concept(("animal",), (0, 1), "lives"),
    )
    pairs = class_pairs(Classifier(weight, torch.zeros(len(weight)), concepts, "mean", "a test"))
    assert pairs.texts == ("cat", "Felis catus", "a pet", "dog", "sky", "animal")
    assert pairs.weight.tolist() == [1, 0.5, 1, 1, 1, 1], "a synonym less, a broader term's definition not at all"
    assert pairs.concept.tolist() == [0, 0, 0, 1, 2, 3] and pairs.classes == 3
    centred = weight - torch.tensor([1.0, 1.0])
    torch.testing.assert_close(pairs.vectors[:3], centred / centred.norm(dim=1).mean())
    torch.testing.assert_close(pairs.vectors[3], (pairs.vectors[0] + pairs.vectors[1]) / 2)


COLUMNS = [
    ("cls", "cls", 4, 4, slice(0, 4)),
    ("mean", "mean+max", 4, 8, slice(0, 4)),
    ("cls", "cls+mean", 4, 8, slice(0, 4)),
    ("mean", "cls+mean", 4, 8, slice(4, 8)),
    ("cls+mean", "cls+mean", 8, 8, slice(0, 8)),
    ("cls", "mean", 4, 4, None),
    ("cls+mean", "cls", 8, 4, None),
    ("mean", "attention", 4, 4, None),
    ("mean", "mean", 5, 4, None),
]


@pytest.mark.parametrize(("reads", "pool", "width", "pooled", "columns"), COLUMNS, ids=lambda each: str(each))
def test_columns_that_the_classifier_reads(reads: str, pool: str, width: int, pooled: int, columns: slice | None):
    classifier = Classifier(torch.zeros(3, width), torch.zeros(3), (), reads, "a test")
    assert classifier_columns(classifier, pool, pooled) == columns


def test_the_packaged_efficientnet_has_its_classifier():
    given = dict(tower="pip:efficientnet-lite0", size=32)
    tower = Tower(load_backbone(ImageTowerSettings(**given)), pool="mean+max", extra_layers=[11])
    found = tower.classifier()
    assert found is not None
    classifier, columns = found
    assert classifier.weight.shape == (1000, 1280) and columns == slice(0, 1280)
    assert Tower(load_backbone(ImageTowerSettings(**given)), pool="attention").classifier() is None
    assert load_backbone(ImageTowerSettings(tower="pip:dinov2-small-focus", size=28)).classifier is None


# --- WordNet ---------------------------------------------------------------------------------------------------------


def test_imagenet_by_hand():
    concepts = imagenet_concepts()
    assert len(concepts) == 1468 and [concept.classes for concept in concepts[:1000]] == [(n,) for n in range(1000)]
    assert concepts[0].names == ("tench", "Tinca tinca") and concepts[0].definition.startswith("freshwater dace-like")
    assert [concepts[n].names[0] for n in (1, 281, 999)] == ["goldfish", "tabby", "toilet tissue"]
    broader = {concept.names[0]: concept for concept in concepts[1000:]}
    bird = broader["bird"]
    assert len(bird.classes) == 59 and {concepts[n].names[0] for n in bird.classes} >= {
        "cock",
        "ostrich",
        "king penguin",
    }
    assert set(broader["dog"].classes) == set(range(151, 269)), "Chihuahua to Mexican hairless"
    assert set(broader["dog"].classes) < set(broader["canine"].classes)
    assert all(2 <= len(concept.classes) <= MOST_CLASSES for concept in concepts[1000:])
    assert not {"entity", "physical entity", "object", "whole"} & broader.keys(), "above too much to say anything"


def test_other_classifiers_get_the_broader_terms_that_the_table_has():
    tabby, goldfish, unknown, dog = "n02123045", "n01443537", "n99999999", "n02084071"
    made = wordnet_concepts(
        [tabby, unknown, goldfish, dog], [["tabby"], ["?"], ["goldfish"], ["dog"]], ["a cat", "", "", ""]
    )
    assert [concept.classes for concept in made[:4]] == [(0,), (1,), (2,), (3,)] and made[0].definition == "a cat"
    broader = {concept.names[0]: concept.classes for concept in made[4:]}
    assert broader["animal"] == (0, 2, 3) and broader["carnivore"] == (0, 3)
    assert "dog" not in broader and "cat" not in broader, "a class itself; above one class only"


def test_labels_are_told_from_numbers_and_imagenet_from_others():
    labels = [", ".join(concept.names) for concept in imagenet_concepts()[:1000]]
    assert is_imagenet([label.split(",")[0] for label in labels])
    assert concepts_of_labels(labels) == (imagenet_concepts(), "ImageNet-1k, WordNet 3.0")
    shifted, _ = concepts_of_labels(["background", *labels])
    assert shifted[0] == Concept(("tench", "Tinca tinca"), (1,), imagenet_concepts()[0].definition)
    assert not is_imagenet(["tench"]) and not is_imagenet([f"thing {n}" for n in range(1000)])
    assert not is_imagenet([label.split(",")[0] for label in reversed(labels)])
    others, source = concepts_of_labels(["great_white_shark, white shark", "cat"])
    assert [concept.names for concept in others] == [("great white shark", "white shark"), ("cat",)]
    assert source == "labels of the checkpoint"
    assert are_names(["cat", "b52", "class of '99"])
    assert not are_names(["cat", "LABEL_1"]) and not are_names(["0", "1"]) and not are_names(["class_3", ""])
