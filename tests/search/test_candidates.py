"""The candidates that an index needs: the fewest that find nearly all of the nearest, on queries near stored ones."""

from __future__ import annotations

import numpy as np
import pytest

from clasp.search.candidates import MEASURED_HITS, fewest_candidates, queries_near

CHOICES = (320, 640, 1280)


def missing(share_by_candidates: dict[int, float]):
    """A search that misses this share of what the exact one finds."""

    def search(queries: np.ndarray, candidates: int | None) -> list[list[str]]:
        lost = 0 if candidates is None else round(len(queries) * MEASURED_HITS * share_by_candidates[candidates])
        found = np.arange(len(queries) * MEASURED_HITS)
        found[:lost] += found.size
        return found.reshape(len(queries), MEASURED_HITS).astype(str).tolist()

    return search


@pytest.mark.parametrize(
    ("missed", "needed"),
    [((0, 0), 320), ((0.03, 0), 320), ((0.05, 0.03), 640), ((0.05, 0.04), 1280), ((1, 1), 1280)],
)
def test_the_fewest_that_find_enough(missed: tuple[float, float], needed: int):
    vectors = np.random.default_rng(0).standard_normal((150, 8))
    search = missing({**dict(zip(CHOICES, missed, strict=False)), 1280: 1})
    assert fewest_candidates(vectors, search, CHOICES) == needed


def test_queries_are_unit_vectors_that_are_not_stored():
    vectors = np.random.default_rng(0).standard_normal((149, 8))
    made = queries_near(vectors)
    assert made.shape == (49, 8) and np.linalg.norm(made, axis=1) == pytest.approx(1)
    assert not np.isclose(made[:, None], vectors[None]).all(axis=2).any()
    assert queries_near(np.array([[0.0, 0], [1, 0], [1, 0]])).tolist() == [[0, 0]]  # not by zero
