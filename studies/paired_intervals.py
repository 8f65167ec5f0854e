"""From answers to numbers with intervals: means over seeds, differences and ratios of rows on the same photos.

In: the answers of some cells. Out: a ``Measured`` for each comparison. Unusual: groups (photos, concepts) and seeds are
resampled together, and by the same draws for both rows of a comparison, so that what makes a photo hard for both does
not widen the interval of their difference. With three seeds the spread over seeds is known roughly; it is in there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from studies.evaluation import Answer

Of = Callable[..., float]
"""What is made of the means of some rows: ``itself``, ``difference``, ..."""

RESAMPLES = 2000
SEEN = 2.8  # standard errors of a difference that a study finds in four cases of five, at the 5 % level: 1.96 + 0.84


@dataclass(frozen=True)
class Measured:
    """A number, its 95 % interval, its standard error, and the share of resamples in which it is a number at all."""

    value: float
    low: float
    high: float
    error: float
    known: float = 1.0

    @property
    def could_see(self) -> float:
        """The least difference that would have been found in four cases of five."""
        return SEEN * self.error


Table = Float[np.ndarray, "seeds groups"]


@dataclass(frozen=True)
class Counts:
    """Queries answered ``right`` and ``asked``, by seed and group."""

    right: Table
    asked: Table

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Counts:
        """Answers to one question, a seed each."""
        right = np.array([_digits(each["right"]) for each in answers])
        asked = [_digits(each["asked"]) if isinstance(each["asked"], str) else each["asked"] for each in answers]
        return cls(right, np.array([np.broadcast_to(row, right.shape[1]) for row in asked], dtype=float))

    def __add__(self, other: Counts) -> Counts:
        """Of two questions about the same groups (languages): their queries together."""
        return Counts(self.right + other.right, self.asked + other.asked)

    @property
    def mean(self) -> float:
        """The share answered right, over all seeds."""
        return float(self.right.sum() / self.asked.sum())


def _digits(text: str) -> Float[np.ndarray, " groups"]:
    return np.array([int(digit, 16) for digit in text], dtype=float)


class Draws:
    """Resamples of seeds and groups, the same for every row that is measured with them."""

    def __init__(self, seeds: int, groups: int, *, resamples: int = RESAMPLES):
        generator = np.random.Generator(np.random.PCG64(0))
        self.seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).astype(float)
        self.groups = generator.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(float)

    def means(self, counts: Counts) -> Float[np.ndarray, " resamples"]:
        """The share of queries answered right, on every resample."""
        right, asked = (((self.seeds @ table) * self.groups).sum(axis=1) for table in (counts.right, counts.asked))
        return right / asked


def measured(rows: Sequence[Counts], of: Callable[..., Any]) -> Measured:
    """``of`` the means of some rows that answered the same question with the same seeds."""
    draws = Draws(*rows[0].right.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = np.asarray(of(*(draws.means(row) for row in rows)), dtype=float)
    finite = resampled[np.isfinite(resampled)]
    value = float(of(*(row.mean for row in rows)))
    if not len(finite):
        return Measured(value, np.nan, np.nan, np.nan, 0.0)
    low, high = np.percentile(finite, [2.5, 97.5])
    return Measured(value, float(low), float(high), float(finite.std(ddof=1)), len(finite) / len(resampled))


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


def pairs_to_reach(rungs: Sequence[int]) -> Callable[..., Any]:
    """Of a mean to reach and a row's means at so many pairs: at how many pairs the row first has it.

    Between two rungs on a straight line over the logarithm of pairs; the first rung where already that is enough, NaN
    where none is. Takes numbers or arrays of resamples.
    """

    def of(target: Any, *means: Any) -> Any:
        goal, *at = np.broadcast_arrays(target, *means)
        reached = np.where(at[0] >= goal, float(rungs[0]), np.nan)
        for fewer, more, low, high in zip(rungs, rungs[1:], at, at[1:], strict=False):
            share = (goal - low) / np.where(high > low, high - low, 1)
            between = fewer * (more / fewer) ** share
            reached = np.where(np.isnan(reached) & (low < goal) & (high >= goal), between, reached)
        return reached if reached.ndim else float(reached)

    return of
