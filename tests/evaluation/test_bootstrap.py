"""The bootstrap against an explicit loop, against theory, and against what groups must and must not change."""

from __future__ import annotations

import math

import pytest
import torch

from clasp.evaluation.bootstrap import GroupedScores, bootstrap_replicates, percentile_intervals


def random_sample(seed, queries, universe, columns=2, cells=None):
    generator = torch.Generator().manual_seed(seed)
    return GroupedScores(
        torch.rand(queries, columns, generator=generator),
        torch.randint(universe, (queries,), generator=generator),
        None if cells is None else torch.randint(cells, (queries,), generator=generator),
    )


def slow_replicates(sample, universe, resamples, seed):
    """Draw groups one resample at a time, list their queries as often as drawn, and take the means."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for drawn in torch.randint(universe, (resamples, universe), generator=generator).tolist():
        queries = [q for group in drawn for q, of in enumerate(sample.groups.tolist()) if of == group]
        cells = [0 if sample.classes is None else sample.classes[q].item() for q in queries]
        means = [
            sample.values[[q for q, of in zip(queries, cells, strict=True) if of == cell]].double().mean(dim=0)
            for cell in sorted(set(cells))
        ]
        rows.append(torch.stack(means).mean(dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize("cells", [None, 1, 3])
def test_replicates_equal_an_explicit_loop(cells):
    samples = [random_sample(0, 30, 8, cells=cells), random_sample(1, 12, 8, columns=1, cells=cells)]
    for sample, got in zip(samples, bootstrap_replicates(samples, group_count=8, resamples=40, seed=5), strict=True):
        torch.testing.assert_close(got, slow_replicates(sample, 8, 40, 5), rtol=1e-12, atol=0)


def test_chunks_of_draws_are_seamless(monkeypatch):
    sample = random_sample(0, 50, 20)
    (whole,) = bootstrap_replicates([sample], group_count=20, resamples=33)
    monkeypatch.setattr("clasp.evaluation.bootstrap.DRAWS_PER_CHUNK", 100)
    (pieces,) = bootstrap_replicates([sample], group_count=20, resamples=33)
    assert torch.equal(whole, pieces)


def test_width_is_that_of_theory():
    values = (torch.rand(400, 1, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    (made,) = bootstrap_replicates([GroupedScores(values, torch.arange(400))], group_count=400, resamples=4000)
    (interval,) = percentile_intervals(made)
    error = math.sqrt(values.mean().item() * (1 - values.mean().item()) / 400)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert interval.low < values.mean().item() < interval.high


def test_copies_within_a_group_add_no_certainty():
    values = torch.rand(50, 1, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(50)
    once, fourfold = bootstrap_replicates(
        [GroupedScores(values, groups), GroupedScores(values.repeat(4, 1), groups.repeat(4))],
        group_count=50,
        resamples=200,
    )
    torch.testing.assert_close(once, fourfold)
    (apart,) = bootstrap_replicates(
        [GroupedScores(values.repeat(4, 1), torch.arange(200))], group_count=200, resamples=200
    )
    assert apart.std() < 0.6 * once.std()


def test_a_mean_over_languages_keeps_what_they_have_in_common():
    """Two languages that fail on the same images: their mean is as uncertain as either; opposite ones cancel."""
    values = torch.rand(60, 1, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(60)
    first, same, opposite = bootstrap_replicates(
        [GroupedScores(values, groups), GroupedScores(values, groups), GroupedScores(1 - values, groups)],
        group_count=60,
        resamples=300,
    )
    torch.testing.assert_close((first + same) / 2, first)
    assert ((first + opposite) / 2).std() < 1e-9


def test_a_resample_without_any_query_is_left_out():
    (made,) = bootstrap_replicates([GroupedScores(torch.ones(1, 1), torch.tensor([2]))], group_count=3, resamples=100)
    assert made.isnan().any() and not made.isnan().all()
    assert percentile_intervals(made) == [(1, 1)]


def test_seeds_repeat_and_differ():
    sample = random_sample(0, 30, 30)
    first, again, other = (
        bootstrap_replicates([sample], group_count=30, resamples=50, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_percentiles():
    made = torch.arange(101, dtype=torch.float64)[:, None].expand(-1, 2) * torch.tensor([1.0, 2.0])
    assert percentile_intervals(made, level=0.5) == [(25, 75), (50, 150)]
