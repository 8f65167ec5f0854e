"""k-NN and linear probes: against slow obvious versions, on features whose answer is visible, and attacked."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from clasp.evaluation.probes import HELD_OUT_EVERY, _held_out_mask, commonest_class_share, knn_probe, linear_probe


def clouds(each: int, classes: int, width: int = 8, apart: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = apart * torch.eye(max(classes, width))[:classes, :width]
    labels = torch.arange(classes).repeat(each)
    return centres[labels] + torch.randn(len(labels), width, generator=generator), labels


def slow_knn(fit: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float) -> int:
    """One query at a time, in plain Python."""
    scores = [float(torch.cosine_similarity(row.double(), query.double(), dim=0)) for row in fit]
    nearest = sorted(range(len(fit)), key=lambda n: -scores[n])[:k]
    votes: defaultdict[int, float] = defaultdict(float)
    for n in nearest:
        votes[int(labels[n])] += math.exp(scores[n] / temperature)
    return max(votes, key=lambda label: votes[label])


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 0.5), (1000, 0.07)])
def test_knn_is_that_of_a_slow_obvious_version(k: int, temperature: float):
    fit, labels = clouds(12, 5, apart=1.5)
    asked, truth = clouds(10, 5, apart=1.5, seed=1)
    named = [slow_knn(fit, labels, query, k, temperature) for query in asked]
    right = [name == label for name, label in zip(named, truth.tolist(), strict=True)]
    assert 0.2 < sum(right) / len(right) < 1
    found = knn_probe(fit, labels, asked, truth, k=k, temperature=temperature, scores_at_once=7 * len(fit))
    assert found.right.tolist() == [float(each) for each in right]
    assert found.predicted.tolist() == named


def test_knn_by_hand():
    """Cosines 1, 0.6 and 0.6 at T = 1: class 0 has e, class 1 twice e^0.6."""
    fit = torch.tensor([[1.0, 0], [0.6, 0.8], [0.6, -0.8]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0]])
    assert 2 * math.exp(0.6) > math.e
    assert knn_probe(fit, labels, query, torch.tensor([1]), k=3, temperature=1.0).right.tolist() == [1.0]
    assert knn_probe(fit, labels, query, torch.tensor([1]), k=3, temperature=0.07).right.tolist() == [0.0]
    # two places, two equally near for the last one: half a vote each, and both are of class 1
    assert knn_probe(fit, labels, query, torch.tensor([0]), k=2, temperature=1.0).right.tolist() == [1.0]


def test_equally_near_neighbours_share_the_last_places():
    fit = torch.tensor([[1.0, 0]] * 3)
    labels = torch.tensor([0, 0, 1])
    query = torch.tensor([[1.0, 0]])
    # two thirds of a vote against one
    assert knn_probe(fit, labels, query, torch.tensor([0]), k=1).right.tolist() == [1.0]
    assert knn_probe(fit[1:], labels[1:], query, torch.tensor([1]), k=1).right.tolist() == [0.5]


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_collapsed_features_score_at_chance(probe: str):
    """One class in two of four is most frequent, so guessing it is right for half of the images asked."""
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 10)
    same, asked = torch.ones(40, 3), torch.ones(40, 3)
    groups = torch.arange(40)
    found = (
        knn_probe(same, labels, asked, labels) if probe == "knn" else linear_probe(same, labels, groups, asked, labels)
    )
    assert found.right.mean() == commonest_class_share(labels) == 0.5


def test_collapsed_features_of_balanced_classes_score_one_in_so_many():
    labels = torch.arange(4).repeat(10)
    assert knn_probe(torch.ones(40, 3), labels, torch.ones(40, 3), labels).right.mean() == pytest.approx(0.25)
    assert commonest_class_share(labels) == 0.25


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_shuffled_labels_score_at_chance(probe: str):
    """Three thousand answers: 0.25 with a deviation of 0.008, somewhat more since they share a fit set."""
    generator = torch.Generator().manual_seed(2)
    scores = []
    for draw in range(6):
        fit, labels = clouds(100, 4, seed=draw)
        asked, truth = clouds(125, 4, seed=100 + draw)
        labels, truth = (each[torch.randperm(len(each), generator=generator)] for each in (labels, truth))
        groups = torch.arange(len(fit))
        found = (
            knn_probe(fit, labels, asked, truth) if probe == "knn" else linear_probe(fit, labels, groups, asked, truth)
        )
        assert commonest_class_share(truth) == 0.25
        scores.append(float(found.right.mean()))
    assert sum(scores) / len(scores) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_classes_apart_are_told_apart(probe: str):
    fit, labels = clouds(20, 4, apart=8)
    asked, truth = clouds(20, 4, apart=8, seed=1)
    found = (
        knn_probe(fit, labels, asked, truth)
        if probe == "knn"
        else linear_probe(fit, labels, torch.arange(80), asked, truth)
    )
    assert found.right.mean() == 1


def test_linear_finds_what_neighbours_cannot():
    """One small feature tells the class, and seven large ones are noise: standardised, it is as large as they."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 8, generator=generator) * torch.tensor([0.01, 1, 1, 1, 1, 1, 1, 1])
    labels = (features[:, 0] > 0).long()
    groups = torch.arange(200)
    given = features[:200], labels[:200], features[200:], labels[200:]
    assert knn_probe(*given).right.mean() < 0.7
    assert linear_probe(given[0], given[1], groups, given[2], given[3]).right.mean() > 0.9


def test_a_strength_is_chosen_on_groups_that_are_not_fitted():
    labels = torch.tensor([0] * 12 + [1] * 6)
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11])
    held = _held_out_mask(labels, groups)
    for group in groups.unique():
        assert held[groups == group].all() or not held[groups == group].any()
    assert groups[held].unique().tolist() == [3, 7, 11]  # every fourth of class 0, the fourth of class 1
    for label in (0, 1):
        assert (~held[labels == label]).any()
    assert HELD_OUT_EVERY == 4


def test_few_images_of_each_class_are_enough():
    fit, labels = clouds(2, 3, width=3, apart=8)
    asked, truth = clouds(5, 3, width=3, apart=8, seed=1)
    assert not _held_out_mask(labels, torch.arange(6)).any()
    assert linear_probe(fit, labels, torch.arange(6), asked, truth).right.mean() == 1


def test_chance_is_of_the_queries_that_are_asked():
    """One answer to all is right for the commonest class, whatever the fit set has."""
    assert commonest_class_share(torch.tensor([0, 1, 2, 2])) == 0.5
    assert commonest_class_share(torch.arange(10).repeat(7)) == pytest.approx(0.1)
    assert commonest_class_share(torch.tensor([1, 1, 0, 3])) == 0.5
