"""Captions of a batch in parts of like length: in go padded rows, out come parts with little padding, and the way back.

Exact, since no row of a tower's input looks at another. What a part costs beyond its tokens is the constant below.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from jaxtyping import Int
from torch import Tensor

from clasp.types import HiddenStates, Tokens

# Cost of one more call of a net, in tokens that could have been computed meanwhile (benchmarks/length_buckets.py)
TOKENS_PER_CALL = {"cpu": 128}
_DEFAULT_TOKENS_PER_CALL = 16_384


def split_by_length(inputs: Tokens | HiddenStates) -> tuple[list[Tokens | HiddenStates], Int[Tensor, " U"] | None]:
    """Parts of the rows of ``inputs``, longest first, each cut to its own longest; and each row's place among them.

    The places are ``None`` where one part is best, which then is ``inputs`` with its ``rows`` left out.
    """
    lengths = inputs.mask.sum(dim=1)
    listed = sorted(lengths.tolist(), reverse=True)
    bounds = optimal_bucket_bounds(listed, TOKENS_PER_CALL.get(lengths.device.type, _DEFAULT_TOKENS_PER_CALL))
    if len(bounds) == 2:
        return [replace(inputs, rows=None)], None
    order = lengths.argsort(descending=True, stable=True)
    parts = [_select_rows(inputs, order[start:end], listed[start]) for start, end in pairwise(bounds)]
    return parts, order.argsort()


def optimal_bucket_bounds(lengths: list[int], call_cost: int) -> list[int]:
    """Where to cut ``lengths`` (falling) so that the sum over parts of rows times longest, plus ``call_cost``, is
    least.

    Returns the bounds of the parts, 0 and ``len(lengths)`` among them. Parts begin where the length falls: between
    equal rows no cut can pay.
    """
    falls = [0, *(n for n in range(1, len(lengths)) if lengths[n] < lengths[n - 1]), len(lengths)]
    least, begins = [0], [0]
    for end in range(1, len(falls)):
        costs = [least[at] + (falls[end] - falls[at]) * lengths[falls[at]] + call_cost for at in range(end)]
        best = min(range(end), key=costs.__getitem__)
        least.append(costs[best])
        begins.append(best)
    bounds, at = [len(lengths)], len(falls) - 1
    while at:
        at = begins[at]
        bounds.append(falls[at])
    return bounds[::-1]


def _select_rows(inputs: Tokens | HiddenStates, rows: Int[Tensor, " part"], longest: int) -> Tokens | HiddenStates:
    mask = inputs.mask[rows, :longest]
    if isinstance(inputs, Tokens):
        return Tokens(inputs.ids[rows, :longest], mask)
    return replace(inputs, values=inputs.values[rows, :longest], mask=mask, rows=None)
