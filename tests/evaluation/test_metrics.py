"""Metrics against answers worked by hand, every order of small ties, a naive version, and attempts to fool them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from clasp.evaluation import metrics
from clasp.evaluation.metrics import (
    RankCounts,
    chance_rank_counts,
    expected_ranks,
    hit_at_k,
    mean_per_class,
    median_rank,
    rank_counts,
)
from clasp.types import UserError


def recall_at_k(counts: RankCounts, k: int) -> float:
    """Expected fraction of queries with a positive among the first k."""
    return hit_at_k(counts, k).mean().item()


def of_scores(scores, query_labels, gallery_labels, **settings):
    """Standings in a score matrix: its rows as queries, the unit vectors as gallery."""
    scores = torch.tensor(scores, dtype=torch.float32)
    labels = torch.tensor(query_labels), torch.tensor(gallery_labels)
    return rank_counts(scores, torch.eye(scores.shape[1]), *labels, **settings)


def counted(*counts):
    return RankCounts(*(torch.tensor([count]) for count in counts))


def embeddings(seed, rows, width=16):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- by hand -------------------------------------------------------------------------------------------------------


def test_counts_by_hand():
    got = of_scores(
        [
            [9, 5, 5, 1],  # right are 2 and 3: beaten by one, level with another
            [9, 5, 5, 1],  # right is 0: nothing better
            [2, 2, 2, 2],  # right are 2 and 3: all level
            [4, 3, 2, 1],  # right are 2 and 3: only the best of them counts
        ],
        [7, 0, 7, 7],
        [0, 1, 7, 7],
    )
    assert got.better.tolist() == [1, 0, 0, 2]
    assert got.tied_negatives.tolist() == [1, 0, 2, 0]
    assert got.tied_positives.tolist() == [1, 1, 2, 1]
    assert expected_ranks(got).tolist() == [2.5, 1, 1 + 2 / 3, 3]
    assert hit_at_k(got, 1).tolist() == [0, 1, 0.5, 0]
    assert hit_at_k(got, 2).tolist() == pytest.approx([0.5, 1, 1 - 1 / 6, 0])
    assert recall_at_k(got, 2) == pytest.approx((0.5 + 1 + 5 / 6) / 4)
    assert median_rank(got) == pytest.approx((1 + 2 / 3 + 2.5) / 2)


def test_mean_per_class_weighs_classes_alike():
    assert mean_per_class(torch.tensor([1.0, 1, 1, 0]), torch.tensor([4, 4, 4, 9])) == 0.5


def test_median_of_an_odd_number_is_the_middle():
    got = RankCounts(torch.tensor([0, 7, 2]), torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long))
    assert median_rank(got) == 3


# --- ties are chance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ([2, 2, 2, 2, 2], {3}),
        ([2, 2, 2, 2, 2], {0, 3}),
        ([3, 2, 2, 2, 1], {1}),
        ([3, 2, 2, 2, 2], {2, 4}),
        ([3, 3, 2, 2, 1], {2, 3, 4}),
        ([3, 3, 3, 2, 2], {0, 1, 4}),
        ([1, 2, 3, 4, 5], {0, 1}),
    ],
)
def test_ties_are_the_mean_over_every_order(scores, right):
    first = []
    for order in itertools.permutations(range(len(scores))):
        ranking = sorted(order, key=lambda item: -scores[item])  # stable: the order decides among equals
        first.append(1 + min(ranking.index(item) for item in right))
    got = of_scores([scores], [1], [int(item in right) for item in range(len(scores))])
    assert expected_ranks(got).item() == pytest.approx(sum(first) / len(first))
    for k in range(1, 8):
        assert hit_at_k(got, k).item() == pytest.approx(sum(rank <= k for rank in first) / len(first), abs=1e-12)


@pytest.mark.parametrize(("negatives", "positives"), [(0, 1), (1, 1), (40, 3), (7, 20), (999, 1)])
@pytest.mark.parametrize("better", [0, 3])
def test_found_is_hypergeometric(better, negatives, positives):
    for k in (1, 2, 5, 10, 45):
        places = min(max(0, k - better), negatives + positives)
        missed = math.comb(negatives, places) / math.comb(negatives + positives, places)
        assert hit_at_k(counted(better, negatives, positives), k).item() == pytest.approx(1 - missed, abs=1e-12)


@pytest.mark.parametrize("vector", [torch.zeros(16), torch.ones(16), embeddings(0, 1)[0]], ids=["zero", "one", "unit"])
@pytest.mark.parametrize("rows", [1, 3, 97])
def test_collapsed_embeddings_score_at_chance(vector, rows):
    labels = torch.arange(97)
    got = rank_counts(vector.expand(97, 16), vector.expand(97, 16), labels, labels, scores_at_once=rows * 97)
    assert recall_at_k(got, 1) == pytest.approx(1 / 97)
    assert recall_at_k(got, 10) == pytest.approx(10 / 97)
    assert median_rank(got) == pytest.approx(49)
    for ours, guess in zip(got, chance_rank_counts(labels, labels), strict=True):
        assert torch.equal(ours, guess)


def test_collapsed_but_for_rounding_scores_at_chance():
    """Even where the rounding favours the right answer: a difference that float32 cannot hold decides nothing."""
    vector = embeddings(0, 1)[0]
    queries, gallery = vector + 1e-8 * embeddings(1, 50), vector + 1e-8 * embeddings(1, 50)
    labels = torch.arange(50)
    assert recall_at_k(rank_counts(queries, gallery, labels, labels), 1) == pytest.approx(1 / 50)


def test_a_real_difference_is_no_tie():
    got = of_scores([[1.0, 1.0 - 1e-5]], [0], [0, 1])
    assert (got.better.item(), got.tied_negatives.item()) == (0, 0)


def test_ties_do_not_depend_on_the_size_of_the_vectors():
    queries, gallery = embeddings(0, 20), embeddings(1, 30)
    labels = torch.arange(20), torch.arange(30) % 20
    plain = rank_counts(queries, gallery, *labels)
    for factor in (1e-6, 1e6):
        for ours, theirs in zip(rank_counts(queries * factor, gallery, *labels), plain, strict=True):
            assert torch.equal(ours, theirs)


def test_shuffled_labels_are_near_chance():
    labels = torch.arange(2000)
    vectors = embeddings(3, 2000, 64)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert recall_at_k(rank_counts(vectors, vectors, labels, labels), 1) == 1
    assert recall_at_k(rank_counts(vectors, vectors, labels, labels[order]), 10) == pytest.approx(10 / 2000, abs=0.006)


# --- against a naive version ---------------------------------------------------------------------------------------


def naive_recall(queries, gallery, query_labels, gallery_labels, k):
    """As CLIP_benchmark has it: the whole score matrix, the top k of each row, any of them right."""
    top = (queries @ gallery.T).topk(k, dim=1).indices
    return (gallery_labels[top] == query_labels[:, None]).any(dim=1).double().mean().item()


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_chunks_equal_the_naive_metric_both_ways(rows):
    images = embeddings(0, 60)
    image_labels = torch.arange(60)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    text_labels = image_labels.repeat_interleave(5)[order]
    texts = F.normalize(images[text_labels] + 2 * embeddings(1, 300), dim=1)
    for arguments in ((images, texts, image_labels, text_labels), (texts, images, text_labels, image_labels)):
        got = rank_counts(*arguments, scores_at_once=rows * len(arguments[1]))
        assert 0.1 < recall_at_k(got, 1) < 0.9
        for k in (1, 5, 10):
            assert recall_at_k(got, k) == pytest.approx(naive_recall(*arguments, k), abs=1e-12)


def test_a_chunk_is_all_that_is_held(monkeypatch):
    largest = []

    def watched(left, right, *, out):
        largest.append(out.numel())
        return multiply(left, right, out=out)

    multiply = torch.mm
    monkeypatch.setattr(metrics.torch, "mm", watched)
    labels = torch.arange(500)
    rank_counts(embeddings(0, 500), embeddings(1, 500), labels, labels, scores_at_once=5000)
    assert max(largest) == 5000
    assert len(largest) == 50


def test_half_precision_is_compared_in_float32_and_gradients_are_left_alone():
    vectors = embeddings(0, 40)
    labels = torch.arange(40)
    half = vectors.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rank_counts(half, half, labels, labels)
    for ours, theirs in zip(inside, rank_counts(half.float(), half.float(), labels, labels), strict=True):
        assert torch.equal(ours, theirs)
    assert recall_at_k(rank_counts(vectors.requires_grad_(), vectors, labels, labels), 1) == 1


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_scores_that_are_not_numbers_are_refused(value):
    vectors = embeddings(0, 10)
    broken = vectors.clone()
    broken[3, 2] = value
    labels = torch.arange(10)
    for queries, gallery in ((broken, broken), (broken * 1e10, vectors), (vectors, broken * 1e10)):
        with pytest.raises(UserError, match="finite"):
            rank_counts(queries, gallery, labels, labels)


def test_a_query_without_answer_is_refused():
    with pytest.raises(UserError, match=r"1 of 2 queries \(first: label 5\) have no positive"):
        of_scores([[1, 2], [1, 2]], [0, 5], [0, 1])


def test_nothing_to_rank_is_refused():
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(UserError, match="0 queries"):
        rank_counts(torch.zeros(0, 4), torch.ones(2, 4), none, torch.arange(2))
    with pytest.raises(UserError, match="gallery of 0"):
        rank_counts(torch.ones(2, 4), torch.zeros(0, 4), torch.arange(2), none)


def test_k_starts_at_one():
    with pytest.raises(UserError, match="k is 0"):
        hit_at_k(counted(0, 0, 1), 0)
