"""Paired bootstrap intervals: means over seeds, differences and ratios of rows on the same photos.

Input: the answers of some cells. Output: a ``Measured`` for each comparison. Note: groups (photos, concepts) and seeds
are resampled together, with the same resamples for both rows of a comparison, so that the difficulty of a photo for
both does not widen the interval of their difference. The variance over seeds is included; with three seeds it is a
rough estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from studies.evaluation import Answer

Of = Callable[..., float]
"""A statistic of the means of some rows: ``itself``, ``difference``, ..."""

RESAMPLES = 2000
SEEN = 2.8  # detectable difference in standard errors, with power 0.8 at the 5 % level: 1.96 + 0.84


@dataclass(frozen=True)
class Measured:
    """A number, its 95 % interval, its standard error, and the fraction of resamples in which it is finite."""

    value: float
    low: float
    high: float
    error: float
    known: float = 1.0

    @property
    def could_see(self) -> float:
        """The minimum detectable difference, with power 0.8."""
        return SEEN * self.error


Table = Float[np.ndarray, "seeds groups"]


@dataclass(frozen=True)
class Counts:
    """Numbers of correct (``right``) and of all queries (``asked``), by seed and group."""

    right: Table
    asked: Table

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Counts:
        """Counts from the answers on one metric, one per seed."""
        right = np.array([_digits(each["right"]) for each in answers])
        asked = [_digits(each["asked"]) if isinstance(each["asked"], str) else each["asked"] for each in answers]
        return cls(right, np.array([np.broadcast_to(row, right.shape[1]) for row in asked], dtype=float))

    def __add__(self, other: Counts) -> Counts:
        """Counts of several metrics over the same groups (languages), their queries pooled."""
        return Counts(self.right + other.right, self.asked + other.asked)

    @property
    def mean(self) -> float:
        """The fraction of correct queries over all seeds."""
        return float(self.right.sum() / self.asked.sum())


def _digits(text: str) -> Float[np.ndarray, " groups"]:
    return np.array([int(digit, 16) for digit in text], dtype=float)


class Draws:
    """Bootstrap resamples of seeds and groups, shared by all rows measured with them."""

    def __init__(self, seeds: int, groups: int, *, resamples: int = RESAMPLES):
        generator = np.random.Generator(np.random.PCG64(0))
        self.seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).astype(float)
        self.groups = generator.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(float)

    def means(self, counts: Counts) -> Float[np.ndarray, " resamples"]:
        """The fraction of correct queries in every resample."""
        right, asked = (((self.seeds @ table) * self.groups).sum(axis=1) for table in (counts.right, counts.asked))
        return right / asked


def measured(rows: Sequence[Counts], of: Callable[..., Any]) -> Measured:
    """The statistic ``of`` the means of some rows on the same metric and seeds."""
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
    """The difference of two means."""
    return row - other


def ratio(row: float, other: float) -> float:
    """The ratio of two means."""
    return row / other


def gained(row: float, full: float, start: float) -> float:
    """A row's improvement over a start as a fraction of that of full training."""
    return (row - start) / (full - start)


def pairs_to_reach(rungs: Sequence[int]) -> Callable[..., Any]:
    """The number of pairs at which a row first reaches a given mean, from its means at several numbers of pairs.

    Interpolates linearly over the logarithm of pairs; the first number of pairs if that suffices, NaN if none does.
    Takes numbers or arrays of resamples.
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
