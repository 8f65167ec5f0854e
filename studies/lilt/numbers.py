"""From answers to numbers with intervals: means over seeds, differences and ratios of rows on the same photos.

In: the answers of some cells. Out: a ``Measured`` for each comparison. Unusual: groups (photos, concepts) and seeds are
resampled together, and by the same draws for both rows of a comparison, so that what makes a photo hard for both does
not widen the interval of their difference. With three seeds the spread over seeds is known roughly; it is in there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from studies.lilt.asking import Answer

RESAMPLES = 2000
SEEN = 2.8  # standard errors of a difference that a study finds in four cases of five, at the 5 % level: 1.96 + 0.84


@dataclass(frozen=True)
class Measured:
    """A number, its 95 % interval, and its standard error."""

    value: float
    low: float
    high: float
    error: float

    @property
    def could_see(self) -> float:
        """The least difference that would have been found in four cases of five."""
        return SEEN * self.error


Counts = Float[np.ndarray, "seeds groups"]


def counts(answers: Sequence[Answer]) -> tuple[Counts, Counts]:
    """Queries answered right, and queries asked, by seed and group."""
    right = np.array([[int(digit, 16) for digit in each["right"]] for each in answers], dtype=float)
    asked = np.array(
        [
            np.full(right.shape[1], each["asked"])
            if isinstance(each["asked"], int)
            else [int(digit, 16) for digit in each["asked"]]
            for each in answers
        ],
        dtype=float,
    )
    assert right.shape == asked.shape, "answers of one question have the same groups"
    return right, asked


class Draws:
    """Resamples of seeds and groups, the same for every row that is measured with them."""

    def __init__(self, seeds: int, groups: int, *, resamples: int = RESAMPLES):
        generator = np.random.Generator(np.random.PCG64(0))
        self.seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).astype(float)
        self.groups = generator.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(float)

    def means(self, answers: Sequence[Answer]) -> Float[np.ndarray, " resamples"]:
        """The share of queries answered right, on every resample."""
        right, asked = (((self.seeds @ each) * self.groups).sum(axis=1) for each in counts(answers))
        return right / asked


def mean(answers: Sequence[Answer]) -> float:
    """The share of queries answered right, over all seeds."""
    right, asked = counts(answers)
    return float(right.sum() / asked.sum())


def measured(rows: Sequence[Sequence[Answer]], of: Callable[..., float]) -> Measured:
    """``of`` the means of some rows, each a list of answers to the same question, a seed each in the same order."""
    draws = Draws(len(rows[0]), len(rows[0][0]["right"]))
    drawn = [draws.means(row) for row in rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = np.asarray(of(*drawn), dtype=float)
    resampled = resampled[np.isfinite(resampled)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Measured(float(of(*map(mean, rows))), float(low), float(high), float(resampled.std(ddof=1)))


def itself(row: float) -> float:
    """The mean of a row."""
    return row


def difference(row: float, other: float) -> float:
    """How much more of the queries a row answers right."""
    return row - other


def ratio(row: float, other: float) -> float:
    """A row as a share of another."""
    return row / other


def gained(row: float, full: float, start: float) -> float:
    """The share of what full training adds to a start that a row adds to it."""
    return (row - start) / (full - start)
