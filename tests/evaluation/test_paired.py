"""Two states compared: means by hand, a change with its own interval, languages and their mean."""

from __future__ import annotations

import pytest
import torch

from clasp.evaluation.language_sets import TrainingStatus
from clasp.evaluation.paired import PairedScores, bootstrap_mean, paired_results


def comparison(
    probe: str, language: str, before: list[float], after: list[float], language_set: TrainingStatus = ""
) -> PairedScores:
    groups = tuple(f"g{n}" for n in range(len(before)))
    return PairedScores(
        probe=probe,
        language=language,
        language_set=language_set,
        groups=groups,
        before=torch.tensor(before, dtype=torch.float32),
        after=torch.tensor(after, dtype=torch.float32),
        chance=0.1,
        seconds=2.0,
    )


def test_a_row_by_hand():
    (row,) = paired_results("toy", [comparison("retention/image_knn", "", [1, 0, 0, 0], [1, 1, 1, 0])])
    assert row.metrics == pytest.approx({"before": 0.25, "after": 0.75, "change": 0.5})
    assert row.chance == {"before": 0.1, "after": 0.1, "change": 0.0}
    assert (row.n, row.seconds, row.language, row.data) == (4, 2.0, "", "toy")
    assert all(row.interval[name].low <= row.metrics[name] <= row.interval[name].high for name in row.metrics)


def test_the_same_answers_change_by_exactly_nothing():
    (row,) = paired_results("toy", [comparison("retention/image_knn", "", [1, 0, 0.5, 0], [1, 0, 0.5, 0])])
    assert row.metrics["before"] == row.metrics["after"] and row.interval["before"] == row.interval["after"]
    assert row.metrics["change"] == 0 and tuple(row.interval["change"]) == (0, 0)


def test_a_change_can_be_certain_where_intervals_overlap():
    """Every tenth query is lost, none is won: few, but the same ones in each draw."""
    before = [1.0, 0.0] * 100
    after = [0.0 if n % 10 == 0 else value for n, value in enumerate(before)]
    (row,) = paired_results("toy", [comparison("retention/image_knn", "", before, after)])
    assert row.interval["after"].high > row.interval["before"].low
    assert row.interval["change"].high < 0


def test_languages_of_a_task_are_followed_by_their_mean():
    rows = paired_results(
        "toy",
        [
            comparison("retention/text_recall@1", "de", [1, 1], [1, 0], "trained"),
            comparison("retention/text_recall@1", "sw", [0, 0, 0, 0], [0, 0, 0, 1], "trained"),
            comparison("retention/text_recall@1", "zu", [0, 1], [0, 1], "never_trained"),
        ],
    )
    assert [(row.task, row.language) for row in rows] == [
        ("retention/text_recall@1/trained", "de"),
        ("retention/text_recall@1/trained", "sw"),
        ("retention/text_recall@1/trained", "macro:trained"),
        ("retention/text_recall@1/never_trained", "zu"),
    ]
    macro = rows[2]
    assert macro.metrics == pytest.approx({"before": 0.5, "after": 0.375, "change": -0.125})
    assert (macro.n, macro.seconds) == (6, 4.0)
    assert macro.interval["after"].low < 0.375 < macro.interval["after"].high


def test_intervals_do_not_depend_on_the_order_of_queries():
    one = paired_results("toy", [comparison("retention/image_knn", "", [1, 0, 0, 1], [1, 1, 0, 0])])[0]
    turned = PairedScores(
        probe="retention/image_knn",
        groups=("g3", "g2", "g1", "g0"),
        before=torch.tensor([1.0, 0, 0, 1]),
        after=torch.tensor([0.0, 0, 1, 1]),
        chance=0.1,
    )
    for end, other in zip(one.interval.values(), paired_results("toy", [turned])[0].interval.values(), strict=True):
        assert tuple(end) == pytest.approx(tuple(other))


def test_a_mean_of_means():
    parts = [(torch.tensor([1.0, 1.0]), ("a", "b")), (torch.tensor([0.0, 0.0, 0.0, 1.0]), ("a", "b", "c", "d"))]
    mean, interval = bootstrap_mean(parts)
    assert mean == pytest.approx(0.625)
    assert interval.low < mean < interval.high
