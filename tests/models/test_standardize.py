"""What heads map: class probabilities, power normalisation and standardisation, alone and in a model that is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clasp.commands.run_context import Preloaded
from clasp.commands.train import train_recipe
from clasp.config.build import build_model, build_model_and_preprocessing, load
from clasp.models.classifier import Classifier
from clasp.models.standardize import ClassProbabilities, FeatureLayout, Standardize, signed_power
from clasp.types import UserError
from toyclassifiers import TRANSFORM, save_colour_classifier
from toydata import COLOURS, toys, write_csv
from toyruns import delta, recipe, save_text_tower

FEATURES = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3, 10, 20, 30]) + 2
PROBABILITIES = ["head.standardize=layer", "head.power=[0.5, 1.0]", "head.class_probabilities=true"]


def classifier() -> Classifier:
    """Four classes read from three columns."""
    generator = torch.Generator().manual_seed(1)
    return Classifier(torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator), (), "mean", "a test")


def test_each_feature_or_each_layer_gets_deviation_1():
    each, layers = Standardize(FeatureLayout([3, 3])), Standardize(FeatureLayout([3, 3], per_layer=True))
    for made in (each, layers):
        made.fit(FEATURES)
        torch.testing.assert_close(made(FEATURES).mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(each(FEATURES).std(0, correction=0), torch.ones(6))
    assert [len(part.unique()) for part in layers.scale.split(3)] == [1, 1]
    for part in layers(FEATURES).split(3, dim=1):
        assert part.var(0, correction=0).mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
def test_rows_that_count_several_times_are_repeated_rows(per_layer: bool):
    counted, repeated = (Standardize(FeatureLayout([2, 4], per_layer, 0.5)) for _ in range(2))
    counts = torch.arange(len(FEATURES)) % 4 + 1
    counted.fit(FEATURES, counts)
    repeated.fit(FEATURES.repeat_interleave(counts, 0))
    for name in ("scale", "shift", "deviations"):
        torch.testing.assert_close(getattr(counted, name), getattr(repeated, name))


def test_the_power_keeps_signs():
    torch.testing.assert_close(signed_power(torch.tensor([-4.0, 0, 9]), 0.5), torch.tensor([-2.0, 0, 3]))
    assert signed_power(FEATURES, 1.0) is FEATURES


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("per_layer", [False, True])
def test_the_inverse_gives_the_pooled_features(per_layer: bool, power: float):
    made = Standardize(FeatureLayout([2, 4], per_layer, power, ClassProbabilities(classifier(), slice(1, 4))))
    made.fit(FEATURES)
    torch.testing.assert_close(made.invert(made(FEATURES)[:, :6]), FEATURES, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_mean_is_shrunk_towards_that_of_its_layer(power: float):
    made = Standardize(FeatureLayout([2, 4], True, power, ClassProbabilities(classifier(), slice(1, 4))))
    made.fit(FEATURES)
    means = signed_power(FEATURES, power).mean(0)
    wanted = torch.cat([part + 0.25 * (part.mean() - part) for part in means.split([2, 4])])
    shrunk = made.shrunk_mean(0.25)
    torch.testing.assert_close(signed_power(made.invert(shrunk[None, :6])[0], power), wanted, rtol=1e-4, atol=1e-4)
    probabilities = made.shrunk_mean(1.0)[6:] - made.shift[6:]
    torch.testing.assert_close(probabilities, probabilities.mean().expand(4), msg="all classes alike")


def test_class_probabilities_stand_beside_the_features():
    made = Standardize(FeatureLayout([6], True, 1.0, ClassProbabilities(classifier(), slice(1, 4))))
    known = classifier()
    wanted = (FEATURES[:, 1:4] @ known.weight.T + known.bias).softmax(1)
    assert made.width == 10
    torch.testing.assert_close(made(FEATURES)[:, 6:], wanted)
    assert not [name for name, _ in made.named_parameters() if "probabilities" in name]
    assert set(made.state_dict()) == {"scale", "shift"}, "the classifier belongs to the tower"


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    save_colour_classifier(folder / "image", toys(90, seed=1), list(COLOURS))
    save_colour_classifier(folder / "unnamed", toys(90, seed=1), [f"LABEL_{number}" for number in range(len(COLOURS))])
    save_text_tower(folder / "text")
    return folder


@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_with_class_probabilities_is_loaded_as_it_was(
    steps: int, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    pairs = write_csv(toys(60), tmp_path)
    given = ["head.init=cca", "head.ridge=[0.1, 0.1]", "head.width=5", f"train.epochs={steps}", *PROBABILITIES]
    ratio = ["data.class_ratio=0.5"] if steps else []
    made = recipe(towers, pairs, *given, *ratio)
    parts = build_model_and_preprocessing(made)
    train_recipe(made, tmp_path / "run", say=lambda line: None, preloaded=Preloaded(parts=parts))
    model = load(tmp_path / "run")
    pixels = torch.stack([TRANSFORM(toy.png) for toy in toys(6, seed=2)])
    with torch.no_grad():
        torch.testing.assert_close(model.encoder.encode_image(pixels), parts.model.encode_image(pixels))
    assert delta(tmp_path / "run")["image_head.map.weight"].shape[1] == 32 + len(COLOURS)
    plain = build_model(recipe(towers, pairs, "head.standardize=layer", "head.width=5"))
    assert plain.image_head.standardize is not None and plain.image_head.standardize.width == 32


@pytest.mark.parametrize("other", ["image.tower=file:{towers}/unnamed", "image.pool=max", "image.pool=attention"])
def test_class_probabilities_need_a_classifier(other: str, towers: Path, tmp_path: Path):
    made = recipe(towers, write_csv(toys(4), tmp_path), "head.init=cca", *PROBABILITIES)
    with pytest.raises(UserError) as refused:
        build_model(made.with_overrides([other.format(towers=towers).replace("pool=max", "pool=mean")]))
    assert "head.class_probabilities = true: file:" in str(refused.value) and "\n" not in str(refused.value)
