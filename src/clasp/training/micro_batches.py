"""One side of a batch, cut into pieces that are embedded one after another.

In: the images or the captions of a batch, in any of the forms that a tower or a head reads. Out: pieces of the same
form, each as narrow as its longest row, and the order that puts their rows back beside their pairs.
Unusual: captions are sorted by length, so that short ones are not padded to the longest of the batch, and a piece of
short ones takes more of them: no more tokens, padding and all, than a piece of the longest has. What repeats (``rows``
of the inputs) is in one piece only.
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
    """Pieces, their first rows with the end of the last (``offsets``), and the place in them of each pair's row.

    ``row_of_pair`` is ``None`` where the rows of the pieces, one after another, are those of the pairs.
    """

    pieces: tuple[TowerInput, ...]
    offsets: tuple[int, ...]
    row_of_pair: Int[Tensor, " B"] | None


def split_micro_batches(inputs: TowerInput, micro_batch: int) -> MicroBatches:
    """Pieces of at most ``micro_batch`` rows of pixels or of the longest captions; pooled vectors stay in one piece."""
    if isinstance(inputs, PooledFeatures):  # only a head reads them
        return MicroBatches((inputs,), (0, len(inputs.values)), None)
    if isinstance(inputs, Pixels):
        marks = _offsets([1] * len(inputs.values), micro_batch)
        return MicroBatches(tuple(Pixels(inputs.values[some]) for some in _slices(marks)), marks, None)
    ends = _ends(inputs)
    order = ends.argsort(stable=True)
    marks = _offsets(ends[order].tolist(), micro_batch)
    places = order.argsort()
    if inputs.rows is not None:
        places = places[inputs.rows]
    return MicroBatches(tuple(take_rows(inputs, order[some]) for some in _slices(marks)), marks, places)


def take_rows(inputs: _InputT, rows: Int[Tensor, " few"]) -> _InputT:
    """Some rows of a side, as narrow as the longest of them; where they repeat, some of the different ones."""
    if isinstance(inputs, Tokens | HiddenStates):
        inputs = replace(inputs, rows=None)
    some = _map_tensors(inputs, lambda tensor: tensor[rows])
    if isinstance(some, Tokens | HiddenStates):
        width = int(_ends(some).max())
        some = _map_tensors(some, lambda tensor: tensor[:, :width])
    return some


def longest_rows(inputs: TowerInput, count: int) -> Int[Tensor, " few"]:
    """The longest ``count`` rows of a side, longest first; the first ones where all are of one length."""
    if isinstance(inputs, Tokens | HiddenStates):
        return _ends(inputs).argsort(descending=True, stable=True)[:count]
    return torch.arange(min(count, len(inputs.values)), device=inputs.values.device)


def count_unique_rows(inputs: TowerInput) -> int:
    """Rows that a side has to be embedded for: those that repeat count once."""
    return len(inputs.ids) if isinstance(inputs, Tokens) else len(inputs.values)


def _map_tensors(inputs: _InputT, change: Callable[[Tensor], Tensor]) -> _InputT:
    named = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return replace(inputs, **{name: change(value) for name, value in named.items() if isinstance(value, Tensor)})


def _ends(inputs: Tokens | HiddenStates) -> Int[Tensor, " rows"]:
    """Where the real tokens of each row end: padding on the left is not cut off."""
    return (inputs.mask * torch.arange(1, inputs.mask.shape[1] + 1, device=inputs.mask.device)).amax(1)


def _offsets(ends: Sequence[int], most: int) -> tuple[int, ...]:
    """Where pieces begin in rows of rising length, taken from the longest down, and where the last one ends."""
    marks, room = [len(ends)], most * ends[-1]
    while (stop := marks[-1]) > 0:
        # the last of a piece is its longest, and says how wide all of it is
        marks.append(max(0, stop - max(1, room // max(1, ends[stop - 1]))))
    return tuple(reversed(marks))


def _slices(marks: Sequence[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(marks)]
