"""When metrics are of too few queries to mean much: one line with the count and how wide their intervals can be.

Input: a number of queries. Output: a warning, or nothing. Note: the bootstrap cannot show this where every query is
right, since then its interval has no width; the bound here is that of a fraction of 1/2, the widest there is.
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_QUERIES = 100
"""Below this, the 95 % interval of a fraction may be ten points or more to either side: 1.96 sqrt(1/4 / n)"""


def small_sample_warning(count: int, what: str, certain: Sequence[str] = ()) -> list[str]:
    """One line: fewer than ``MIN_QUERIES``, and ``certain``, metrics that are 100 % for any model; none if neither."""
    reasons = []
    if count < MIN_QUERIES:
        points = min(98 / max(count, 1) ** 0.5, 50)
        reasons.append(f"few {what} ({count:,}): 95 % intervals may be ±{points:.0f} points wide")
    if certain:
        reasons.append(f"{', '.join(certain)} cannot be less than 100 %")
    return [f"warning: {', and '.join(reasons)}"] if reasons else []


def few_validation_pairs(count: int) -> list[str]:
    """The warning before training, by the number of groups of validation pairs."""
    return [f"{line}; name more with data.val=PAIRS" for line in small_sample_warning(count, "validation pairs")]
