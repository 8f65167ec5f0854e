"""Class pairs in the closed form: they are learned from, alone and beside real pairs, with their true names only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clasp.commands import fit_run
from clasp.config.build import load
from clasp.config.recipe import Recipe
from clasp.models.classifier import Classifier, class_pairs
from clasp.models.concepts import single_class_concepts
from clasp.models.standardize import FeatureLayout, Standardize
from clasp.training.class_pairs import ClassPairFeatures, WeightedClassPairs
from clasp.training.initialize import initialize_heads
from clasp.training.moments import PairMoments
from clasp.training.pooled_features import PairFeatures
from clasp.types import UserError
from toyclassifiers import TRANSFORM, save_colour_classifier
from toydata import COLOURS, Toy, toys, write_csv
from toyruns import delta, lines, recipe, run, save_text_tower

TOYS, OTHERS = toys(60), toys(90, seed=1)
ALONE = "data.class_weight=1e9"  # real pairs give the mean and deviation of the features, and else nothing


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    save_colour_classifier(folder / "image", OTHERS, list(COLOURS))
    save_colour_classifier(folder / "unnamed", OTHERS, [f"LABEL_{number}" for number in range(len(COLOURS))])
    save_text_tower(folder / "text")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(TOYS, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))


def closed_form(towers: Path, pairs: Path, *overrides: str) -> Recipe:
    """No gradient step; a few directions, as there are six classes."""
    given = ["head.init=cca", "head.ridge=[0.1, 0.1]", "head.width=5", "train.epochs=0"]
    return recipe(towers, pairs, *given, *overrides)


def accuracy(folder: Path, some: list[Toy]) -> float:
    """Zero-shot: the colour of a drawing among all."""
    model = load(folder)
    texts = model.encode_text(list(COLOURS))
    images = model.encoder.encode_image(torch.stack([TRANSFORM(toy.png) for toy in some]))
    found = (images @ texts.T).argmax(1)
    return float(np.mean([list(COLOURS)[place] == toy.colour for place, toy in zip(found.tolist(), some, strict=True)]))


# --- what is learned -------------------------------------------------------------------------------------------------


def test_classes_alone_teach_their_names(towers: Path, pairs: Path, tmp_path: Path):
    run(closed_form(towers, pairs, ALONE), tmp_path / "run")
    assert accuracy(tmp_path / "run", toys(60, seed=2)) > 0.6


def test_wrong_names_teach_nothing(towers: Path, pairs: Path, tmp_path: Path):
    names = list(COLOURS)
    save_colour_classifier(tmp_path / "wrong", OTHERS, names[1:] + names[:1])
    run(closed_form(towers, pairs, ALONE, f"image.tower=file:{tmp_path / 'wrong'}"), tmp_path / "run")
    assert accuracy(tmp_path / "run", toys(60, seed=2)) < 1 / 6


def test_beside_real_pairs_they_decide_what_those_do_not(towers: Path, tmp_path: Path):
    """Real captions name the shape only; the colours are known from the classes."""
    shapes = write_csv([toy._replace(colour="a") for toy in TOYS], tmp_path)  # "a a ring"
    run(closed_form(towers, shapes, "data.class_weight=0"), tmp_path / "without")
    run(closed_form(towers, shapes), tmp_path / "with")
    assert accuracy(tmp_path / "without", toys(60, seed=2)) < 0.5
    assert accuracy(tmp_path / "with", toys(60, seed=2)) > 0.6


def test_weight_0_is_bitwise_the_run_of_a_tower_without(towers: Path, pairs: Path, tmp_path: Path):
    steps = ["train.epochs=1", "train.select=last"]
    run(closed_form(towers, pairs, "data.class_weight=0", *steps), tmp_path / "zero")
    run(closed_form(towers, pairs, f"image.tower=file:{towers / 'unnamed'}", *steps), tmp_path / "none")
    run(closed_form(towers, pairs, *steps), tmp_path / "with")
    one, two, other = (delta(tmp_path / name) for name in ("zero", "none", "with"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not torch.equal(one["text_head.map.weight"], other["text_head.map.weight"])
    events = [[line["event"] for line in lines(tmp_path / name / "log.jsonl")] for name in ("zero", "none", "with")]
    assert ["class_pairs" in each for each in events] == [False, False, True]


@pytest.mark.parametrize("other", ["image.tower=file:{towers}/unnamed", "image.pool=attention"])
def test_a_tower_without_a_classifier_is_refused_by_number_only(other: str, towers: Path, pairs: Path, tmp_path: Path):
    made = closed_form(towers, pairs, other.format(towers=towers))
    run(made, tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.class_weight = 3: file:.* has no classifier") as refused:
        run(made.with_overrides(["data.class_weight=3"]), tmp_path / "refused")
    assert "\n" not in str(refused.value) and not (tmp_path / "refused").exists()


# --- the closed form -------------------------------------------------------------------------------------------------


def some_features() -> ClassPairFeatures:
    """Three classes of two names and a definition, read from columns 1 to 4 of six."""
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    concepts = single_class_concepts([["a", "b"], ["c"], ["d"]], ["what it is", "", ""])
    pairs = class_pairs(Classifier(weight, torch.zeros(3), concepts, "mean", "a test"))
    text = torch.randn(len(pairs.texts), 4, generator=torch.Generator().manual_seed(1))
    return ClassPairFeatures(WeightedClassPairs(pairs, slice(1, 4), 2.0, "a test"), text)


def standardized(width: int) -> Standardize:
    made = Standardize(FeatureLayout([width]))
    made.fit(torch.randn(50, width, generator=torch.Generator().manual_seed(2)) * torch.arange(1, width + 1) + 3)
    return made


def test_moments_are_those_of_the_pairs_one_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clasp.training.class_pairs._PAIRS_AT_ONCE", 2)
    features, image, text = some_features(), standardized(6), standardized(4)
    pairs = features.classes.pairs
    rows = []
    for number in pairs.concept.tolist():
        row = torch.zeros(6)
        row[1:4] = pairs.vectors[number] / image.scale[1:4].detach()  # the deviation of a feature is 1 / scale
        rows.append(row)
    mean = float(np.mean([float(row.norm()) for row in rows]))
    rows = [row * 3**0.5 / mean for row in rows]  # as long as standardised features of that width
    apart = PairMoments.empty(6, 4)  # training images whose features are uncorrelated: nothing predicts other columns
    apart.weight = 1.0
    apart.image_image.fill_diagonal_(1.0)
    moments = features.moments(image, text, apart, 1.0)
    assert moments.weight == pytest.approx(float(pairs.weight.sum())) == pytest.approx(1 + 1 / 2 + 1 + 1 + 1)
    across = sum(
        weight * torch.outer(row.double(), text(of)[0].detach().double())
        for weight, row, of in zip(pairs.weight.tolist(), rows, features.text[:, None], strict=True)
    )
    assert isinstance(across, Tensor)
    torch.testing.assert_close(moments.image_text, across, rtol=1e-5, atol=1e-5)
    assert not moments.image_image[0].any() and not moments.image_image[4:].any()


def test_a_class_has_one_pattern_however_features_are_standardised():
    rows = []
    for per_layer in (False, True):
        made = Standardize(FeatureLayout([6], per_layer))
        made.fit(torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 7) + 3)
        rows.append(some_features().patterns(made))
    torch.testing.assert_close(*rows)
    assert rows[0].any()


def test_the_heads_are_the_cca_of_both_sources(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Against weighted rows, each source less its mean, and the singular values of the whole."""
    seen = {}

    def watched(model, sides, settings, tally, classes):
        initialize_heads(model, sides, settings, tally, classes)
        real = PairFeatures(model, sides, sides.pairs, tally).rows(np.arange(len(sides.pairs)), 0)
        seen.update(model=model, classes=classes, real=real)

    monkeypatch.setattr(fit_run, "initialize_heads", watched)
    run(closed_form(towers, pairs, "data.class_weight=2"), tmp_path / "run")
    model, classes = seen["model"], seen["classes"]
    image, text = model.image_head, model.text_head
    x, y = image.standardize(seen["real"][0]).detach(), text.standardize(seen["real"][1]).detach()
    pairs_of = classes.classes.pairs
    patterns, named = classes.patterns(image.standardize)[pairs_of.concept], text.standardize(classes.text).detach()
    mass = {"real": len(x), "classes": 2 * len(COLOURS)}
    left, right, means = [], [], []
    for name, a, b, w in (("real", x, y, torch.ones(len(x))), ("classes", patterns, named, pairs_of.weight)):
        share = (w / w.sum())[:, None].double()
        means.append((mass[name] / sum(mass.values()), (share * a).sum(0), (share * b).sum(0)))
        root = (share * means[-1][0]).sqrt()
        left.append(root * (a - means[-1][1]))
        right.append(root * (b - means[-1][2]))
    a, b = torch.cat(left), torch.cat(right)
    roots = [torch.linalg.cholesky(m.T @ m + 0.1 * torch.eye(m.shape[1], dtype=m.dtype)) for m in (a, b)]
    whitened = torch.linalg.inv(roots[0]) @ a.T @ b @ torch.linalg.inv(roots[1]).T
    correlations = torch.linalg.svdvals(whitened)[:5]
    rows = [h.map.weight.detach().double() @ root for h, root in zip((image, text), roots, strict=True)]
    for each in rows:  # unit directions, each times its correlation
        torch.testing.assert_close(each.norm(dim=1), correlations, rtol=1e-3, atol=1e-4)
    agreed = (rows[0] @ whitened @ rows[1].T).diagonal() / correlations**2
    torch.testing.assert_close(agreed, correlations, rtol=1e-3, atol=1e-4)
    # the bias takes the training images' mean away, and the weighted mean of captions and class names
    centre = sum(share * of_text for share, _, of_text in means).float()
    torch.testing.assert_close(text.map.bias, -(text.map.weight @ centre), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(image.map.bias, -(image.map.weight @ means[0][1].float()), rtol=1e-3, atol=1e-4)


def test_a_shrunk_mean_changes_what_the_image_head_subtracts_alone(towers: Path, pairs: Path, tmp_path: Path):
    settings = ["head.standardize=layer", "head.mean_shrinkage=0.5"]
    for name, some in (("as they are", settings[:1]), ("shrunk", settings)):
        run(closed_form(towers, pairs, *some), tmp_path / name)
    before, after = delta(tmp_path / "as they are"), delta(tmp_path / "shrunk")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["image_head.map.bias"]
    shift = before["image_head.standardize.shift"]
    moved = 0.5 * (shift - shift.mean())  # of one layer, whose mean is -shift in units of its factor
    change = after["image_head.map.bias"] - before["image_head.map.bias"]
    torch.testing.assert_close(change, -(before["image_head.map.weight"] @ moved), rtol=1e-3, atol=1e-4)


def test_correlation_powers_of_the_same_sum_keep_the_products_of_the_heads(towers: Path, pairs: Path, tmp_path: Path):
    for name, some in (("even", ()), ("uneven", ("head.correlation_power=[0.5, 1.5]",))):
        run(closed_form(towers, pairs, *some), tmp_path / name)
    even, uneven = delta(tmp_path / "even"), delta(tmp_path / "uneven")
    products = [each["image_head.map.weight"].T @ each["text_head.map.weight"] for each in (even, uneven)]
    torch.testing.assert_close(products[1], products[0], rtol=1e-3, atol=1e-5)
    image, text = (uneven[f"{side}_head.map.weight"] / even[f"{side}_head.map.weight"] for side in ("image", "text"))
    assert (image[:5] > 1).all() and (text[:5] < 1).all(), "correlations are below 1"
