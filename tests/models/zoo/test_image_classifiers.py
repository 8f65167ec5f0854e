"""Image classifiers of ``transformers``: weights, names and the pooling they read, from folders as the hub has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings
from clasp.models.zoo.registry import load_backbone
from clasp.types import Pixels
from toyclassifiers import CLASSIFIERS, classifier_net, save_classifier
from toysavedtowers import save

LABELS = ("tabby, tabby cat", "Egyptian cat", "sky")


def opened(folder: Path, **settings) -> Tower:
    return Tower(load_backbone(ImageTowerSettings(tower=f"file:{folder}")), **settings)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_its_logits_are_those_of_the_whole_net(family: str, tmp_path: Path):
    reads = CLASSIFIERS[family][2]
    tower = opened(save_classifier(family, LABELS, tmp_path), pool=reads)
    found = tower.classifier()
    assert found is not None
    classifier, columns = found
    assert classifier.pool == reads and classifier.source == "labels of the checkpoint"
    assert [concept.names for concept in classifier.concepts] == [("tabby", "tabby cat"), ("Egyptian cat",), ("sky",)]
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = classifier_net(family, LABELS)(pixel_values=pixels).logits
        ours = tower.pooled(Pixels(pixels))[:, columns] @ classifier.weight.T
    torch.testing.assert_close(ours[0] - ours[1], logits[0] - logits[1], rtol=1e-3, atol=1e-4)  # without the bias


def test_no_names_no_classifier_no_pairs(tmp_path: Path):
    assert load(save_classifier("vit", ["LABEL_0", "LABEL_1"], tmp_path / "numbers")) is None
    assert load(save("vit", tmp_path / "encoder")) is None
    zeroed = save_classifier("vit", LABELS, tmp_path / "zeroed")
    change(zeroed, weight=torch.zeros(3, 32))
    assert opened(zeroed).classifier() is None
    lacking = save_classifier("vit", LABELS, tmp_path / "lacking")
    change(lacking, weight=None)
    assert opened(lacking).classifier() is None, "transformers would draw another at random"
    named = save_classifier("vit", LABELS, tmp_path / "named")
    assert opened(named, pool="mean").classifier() is None
    found = opened(named, pool="cls+mean").classifier()
    assert found is not None and found[1] == slice(0, 32)


def load(folder: Path) -> object:
    return load_backbone(ImageTowerSettings(tower=f"file:{folder}")).classifier


def change(folder: Path, weight: torch.Tensor | None) -> None:
    """Replace the last layer's weight, or leave it out."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    given = {} if weight is None else {"classifier.weight": weight}
    save_file({**tensors, **given}, folder / "model.safetensors", {"format": "pt"})


def test_counting_parameters_reads_no_classifier(tmp_path: Path):
    folder = save_classifier("vit", LABELS, tmp_path)
    assert load_backbone(ImageTowerSettings(tower=f"file:{folder}"), meta=True).classifier is None


def test_a_classifier_of_the_tower_as_tuned_is_that_of_the_checkpoint(tmp_path: Path):
    """The pooling is found on the whole net from the file, whatever was inserted in the tower's."""
    tower = opened(save_classifier("vit", LABELS, tmp_path))
    tower.tune(["adapters(init='random')"], seed=0)
    assert tower.classifier() is not None
