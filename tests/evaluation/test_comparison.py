"""Two models on the same queries: the tests against scipy, the interval against a loop, the sentence by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch

from clasp.evaluation.bootstrap import ConfidenceInterval
from clasp.evaluation.comparison import (
    Comparison,
    McNemar,
    bootstrap_p_value,
    compare_scored,
    primary_comparison,
)
from clasp.evaluation.query_scores import MeanMetric, QueryScores
from clasp.evaluation.tasks import ScoredQueries, SingleTask
from clasp.report.model_comparison import comparison_sentence, model_comparison_table
from clasp.types import UserError


@pytest.mark.parametrize("first, second", [(0, 0), (1, 0), (3, 3), (10, 2), (2, 10), (31, 17), (400, 333)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int):
    p = McNemar(first, second).p_value
    n = first + second
    assert p == pytest.approx(scipy.stats.binomtest(first, n).pvalue if n else 1.0, abs=1e-12)


class Asked:
    """Queries whose scores are given; nothing is embedded."""

    directions, metric_names = ("",), ("right", "graded")

    def score(self, encoder, images):
        raise NotImplementedError


TASK = SingleTask(data="zoo", images=lambda: [], queries=Asked(), name="toy", primary="right")


def scored(right, graded, groups=None, ids=None) -> list[ScoredQueries]:
    ids = tuple(ids or (f"q{n:03}" for n in range(len(right))))
    means = {
        "right": MeanMetric(torch.tensor(right, dtype=torch.float64)),
        "graded": MeanMetric(torch.tensor(graded, dtype=torch.float64)),
    }
    one = QueryScores(
        direction="",
        ids=ids,
        groups=tuple(groups or ids),
        means=means,
        medians={},
        chance={},
        expected=ids,
        predict=lambda: list(ids),
    )
    return [ScoredQueries("", [one], 0.0, 0.0)]


def draw(count: int, seed: int):
    chance = np.random.default_rng(seed)
    right = (chance.random((2, count)) < [[0.7], [0.55]]).astype(float)
    graded = np.clip(chance.normal([[0.6], [0.5]], 0.2, (2, count)), 0, 1)
    return right, graded


def test_the_interval_of_the_difference_is_that_of_paired_draws():
    """Against scipy's percentile bootstrap of pairs, to the error of 10,000 resamples."""
    right, graded = draw(200, 3)
    sides = (scored(*of) for of in zip(right, graded, strict=True))
    found = {each.metric: each for each in compare_scored(TASK, *sides)}
    for name, values in (("right", right), ("graded", graded)):
        theirs = scipy.stats.bootstrap(
            tuple(values),
            lambda a, b, axis: np.mean(a - b, axis=axis),
            paired=True,
            method="percentile",
            n_resamples=10_000,
            rng=np.random.default_rng(0),
        ).confidence_interval
        each = found[name]
        assert each.difference == pytest.approx(np.mean(values[0] - values[1]), abs=1e-12)
        assert (each.first, each.second) == pytest.approx(tuple(values.mean(axis=1)), abs=1e-12)
        assert tuple(each.interval) == pytest.approx(tuple(theirs), abs=0.006)
    only = int(((right[0] == 1) & (right[1] == 0)).sum()), int(((right[0] == 0) & (right[1] == 1)).sum())
    assert (found["right"].only_first, found["right"].only_second) == only and found["right"].test == "mcnemar"
    assert found["right"].p_value == pytest.approx(scipy.stats.binomtest(only[0], sum(only)).pvalue)
    assert found["graded"].test == "bootstrap" and found["graded"].only_first is None


def test_the_interval_against_all_resamples_there_are():
    """Of four queries there are 256 equally likely resamples; ours are 10,000 of these."""
    change = np.array([0.5, -0.2, 0.1, 0.4])
    means = np.array([change[list(rows)].mean() for rows in product(range(4), repeat=4)])
    (_, each) = compare_scored(TASK, scored([1, 0, 1, 1], change + 0.3), scored([0, 0, 1, 1], [0.3] * 4))
    assert tuple(each.interval) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.03)
    assert each.p_value == pytest.approx(2 * (means <= 0).mean(), abs=0.02)


def test_whole_groups_are_drawn_and_have_no_mcnemar_test():
    right, graded = draw(60, 1)
    alone, together = (
        compare_scored(TASK, scored(right[0], graded[0], groups), scored(right[1], graded[1], groups), resamples=2000)[
            0
        ]
        for groups in (None, [f"g{n // 20}" for n in range(60)])
    )
    assert (alone.test, together.test) == ("mcnemar", "bootstrap")
    assert alone.difference == together.difference and alone.interval != together.interval


def test_queries_are_matched_by_id_and_must_be_the_same():
    right, graded = draw(30, 2)
    ids = [f"q{n:03}" for n in range(30)]
    order = list(np.random.default_rng(0).permutation(30))
    shuffled = scored(right[1][order], graded[1][order], ids=[ids[row] for row in order])
    straight = scored(right[1], graded[1])
    expected, found = (compare_scored(TASK, scored(right[0], graded[0]), other) for other in (straight, shuffled))
    for each, other in zip(found, expected, strict=True):
        assert tuple(each.interval) == pytest.approx(tuple(other.interval))
        assert (each.difference, each.p_value) == pytest.approx((other.difference, other.p_value))
        assert each.only_first == other.only_first
    with pytest.raises(UserError, match="same queries: 2 of 30 are of one model only: 'else', 'q029'"):
        compare_scored(TASK, straight, scored(right[1], graded[1], ids=[*ids[:-1], "else"]))


def test_a_model_does_not_differ_from_itself():
    right, graded = draw(50, 4)
    for each in compare_scored(TASK, scored(right[0], graded[0]), scored(right[0], graded[0])):
        assert each.difference == 0 and tuple(each.interval) == (0, 0) and each.p_value == 1 and not each.significant


def test_the_false_positive_rate_is_the_level():
    """Two models that are right with one probability: about one comparison in twenty is significant."""
    chance = np.random.default_rng(5)
    found = 0
    for _ in range(200):
        right = (chance.random((2, 100)) < 0.6).astype(float)
        first, second = (scored(side, side) for side in right)
        found += compare_scored(TASK, first, second, resamples=200)[0].significant
    assert found / 200 < 0.08, "McNemar's exact test is conservative"


def test_p_of_replicates():
    change = torch.linspace(-0.1, 0.9, 999)
    assert bootstrap_p_value(change) == pytest.approx(2 * (int((change <= 0).sum()) + 1) / 1000)
    assert bootstrap_p_value(torch.ones(999)) == pytest.approx(0.002)
    assert bootstrap_p_value(torch.tensor([torch.nan, 1.0, -1.0, 1.0])) == 1.0


def made(difference: float, low: float, high: float, p: float) -> Comparison:
    return Comparison(
        task="zeroshot",
        language="",
        metric="top1",
        first=0.5 + difference,
        second=0.5,
        difference=difference,
        interval=ConfidenceInterval(low, high),
        p_value=p,
        test="mcnemar",
        only_first=3,
        only_second=2,
        n=1200,
    )


@pytest.mark.parametrize(
    "comparison, sentence",
    [
        (
            made(0.021, 0.004, 0.038, 0.012),
            "A is better than B by 2.1 points of top1 (0.4 to 3.8), p = 0.012, 1,200",
        ),
        (
            made(-0.3, -0.4, -0.2, 1e-9),
            "B is better than A by 30.0 points of top1 (20.0 to 40.0), p < 0.001, 1,2",
        ),
        (
            made(0.01, -0.01, 0.03, 0.31),
            "no difference shown in top1: A minus B is +1.0 points (-1.0 to +3.0), p = 0.31, 1,200 queries",
        ),
        (
            made(0.01, 0.001, 0.03, 0.06),
            "no difference shown in top1: A minus B is +1.0 points (+0.1 to +3.0), p = 0.06,",
        ),
    ],
)
def test_the_sentence(comparison: Comparison, sentence: str):
    assert comparison_sentence("A", "B", comparison).startswith(sentence)


def test_the_table_and_the_primary_metric():
    right, graded = draw(80, 6)
    found = compare_scored(TASK, scored(right[0], graded[0]), scored(right[1], graded[1]), resamples=500)
    primary = primary_comparison(TASK, found)
    assert primary.metric == "right"
    table = model_comparison_table(found, primary)
    assert table.columns == ("toy", "A", "B", "difference", "95 %", "p")
    assert [row[0] for row in table.rows] == ["right", "graded"] and table.rows[0][-1].endswith("*")
