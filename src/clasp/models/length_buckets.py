"""Length bucketing: splits the padded captions of a batch into parts of similar length.

Input: padded rows. Output: parts with little padding, and the permutation that restores the order of the rows. The
result is exact, since rows do not interact in a tower. The overhead of one more call is the constant below.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from jaxtyping import Int
from torch import Tensor

from clasp.types import HiddenStates, Tokens

# Overhead of one more call of a tower, in tokens computed in the same time (benchmarks/length_buckets.py)
TOKENS_PER_CALL = {"cpu": 128}
_DEFAULT_TOKENS_PER_CALL = 16_384


def split_by_length(inputs: Tokens | HiddenStates) -> tuple[list[Tokens | HiddenStates], Int[Tensor, " U"] | None]:
    """The rows of ``inputs`` in parts, longest first, each truncated to its longest row; and each row's index in them.

    The index is ``None`` where a single part is optimal: then the part is ``inputs`` with ``rows=None``.
    """
    lengths = inputs.mask.sum(dim=1)
    falling = sorted(lengths.tolist(), reverse=True)
    bounds = optimal_bucket_bounds(falling, TOKENS_PER_CALL.get(lengths.device.type, _DEFAULT_TOKENS_PER_CALL))
    if len(bounds) == 2:
        return [replace(inputs, rows=None)], None
    order = lengths.argsort(descending=True, stable=True)
    parts = [_select_rows(inputs, order[start:end], falling[start]) for start, end in pairwise(bounds)]
    return parts, order.argsort()


def optimal_bucket_bounds(lengths: list[int], call_cost: int) -> list[int]:
    """Bounds of the parts of ``lengths`` (in falling order) that minimise the sum of rows x longest + ``call_cost``.

    The bounds include 0 and ``len(lengths)``. Dynamic programming over the positions where the length falls: a bound
    between equal lengths is never better.
    """
    falls = [0, *(n for n in range(1, len(lengths)) if lengths[n] < lengths[n - 1]), len(lengths)]
    costs_to, starts = [0], [0]
    for end in range(1, len(falls)):
        costs = [costs_to[at] + (falls[end] - falls[at]) * lengths[falls[at]] + call_cost for at in range(end)]
        best = min(range(end), key=costs.__getitem__)
        costs_to.append(costs[best])
        starts.append(best)
    bounds, at = [len(lengths)], len(falls) - 1
    while at:
        at = starts[at]
        bounds.append(falls[at])
    return bounds[::-1]


def _select_rows(inputs: Tokens | HiddenStates, rows: Int[Tensor, " part"], longest: int) -> Tokens | HiddenStates:
    mask = inputs.mask[rows, :longest]
    if isinstance(inputs, Tokens):
        return Tokens(inputs.ids[rows, :longest], mask)
    return replace(inputs, values=inputs.values[rows, :longest], mask=mask, rows=None)
