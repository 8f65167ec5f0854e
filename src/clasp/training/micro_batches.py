"""Splits one modality of a batch into micro-batches, which are embedded one after another.

Input: the images or the captions of a batch, in any input type of a tower or head. Output: micro-batches of the same
type, each truncated to its longest row, and the index that restores the order of the pairs. Note: captions are sorted
by length, so that short ones are not padded to the longest of the batch, and a micro-batch of short ones has more rows:
its padded tokens are at most those of a micro-batch of the longest. Repeated rows (``rows`` of the inputs) are embedded
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from clasp.types import HiddenStates, Pixels, PooledFeatures, Tokens

TowerInput = Pixels | Tokens | HiddenStates | PooledFeatures
_InputT = TypeVar("_InputT", bound=TowerInput)


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """The micro-batches, the offsets of their rows (the total included), and the row of each pair in them.

    ``row_of_pair`` is ``None`` where the concatenated rows are in the order of the pairs.
    """

    pieces: tuple[TowerInput, ...]
    offsets: tuple[int, ...]
    row_of_pair: Int[Tensor, " B"] | None


def split_micro_batches(inputs: TowerInput, micro_batch: int) -> MicroBatches:
    """Micro-batches of at most ``micro_batch`` rows of pixels or of the longest captions; pooled vectors are not
    split."""
    if isinstance(inputs, PooledFeatures):  # only a head runs on them
        return MicroBatches((inputs,), (0, len(inputs.values)), None)
    if isinstance(inputs, Pixels):
        offsets = _offsets([1] * len(inputs.values), micro_batch)
        return MicroBatches(tuple(Pixels(inputs.values[rows]) for rows in _slices(offsets)), offsets, None)
    ends = _ends(inputs)
    order = ends.argsort(stable=True)
    offsets = _offsets(ends[order].tolist(), micro_batch)
    row_of_pair = order.argsort()
    if inputs.rows is not None:
        row_of_pair = row_of_pair[inputs.rows]
    return MicroBatches(tuple(take_rows(inputs, order[rows]) for rows in _slices(offsets)), offsets, row_of_pair)


def take_rows(inputs: _InputT, rows: Int[Tensor, " few"]) -> _InputT:
    """Some rows of the inputs, truncated to the longest of them; ``rows`` counts repeated inputs once."""
    if isinstance(inputs, Tokens | HiddenStates):
        inputs = replace(inputs, rows=None)
    taken = _map_tensors(inputs, lambda tensor: tensor[rows])
    if isinstance(taken, Tokens | HiddenStates):
        longest = int(_ends(taken).max())
        taken = _map_tensors(taken, lambda tensor: tensor[:, :longest])
    return taken


def longest_rows(inputs: TowerInput, count: int) -> Int[Tensor, " few"]:
    """The longest ``count`` rows, longest first; the first ``count`` rows of inputs without length."""
    if isinstance(inputs, Tokens | HiddenStates):
        return _ends(inputs).argsort(descending=True, stable=True)[:count]
    return torch.arange(min(count, len(inputs.values)), device=inputs.values.device)


def count_unique_rows(inputs: TowerInput) -> int:
    """Number of rows to embed: repeated rows count once."""
    return len(inputs.ids) if isinstance(inputs, Tokens) else len(inputs.values)


def _map_tensors(inputs: _InputT, change: Callable[[Tensor], Tensor]) -> _InputT:
    named = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return replace(inputs, **{name: change(value) for name, value in named.items() if isinstance(value, Tensor)})


def _ends(inputs: Tokens | HiddenStates) -> Int[Tensor, " rows"]:
    """The end of the real tokens of each row; left padding is included."""
    return (inputs.mask * torch.arange(1, inputs.mask.shape[1] + 1, device=inputs.mask.device)).amax(1)


def _offsets(ends: Sequence[int], most: int) -> tuple[int, ...]:
    """Offsets of micro-batches in rows of rising length, filled from the longest down."""
    offsets, tokens = [len(ends)], most * ends[-1]
    while (stop := offsets[-1]) > 0:
        # the last row of a micro-batch is its longest, to which all its rows are padded
        offsets.append(max(0, stop - max(1, tokens // max(1, ends[stop - 1]))))
    return tuple(reversed(offsets))


def _slices(offsets: Sequence[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(offsets)]
