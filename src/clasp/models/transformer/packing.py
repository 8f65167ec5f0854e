"""Captions of a batch as one sequence without padding, for forward passes without gradients.

Input: the attention mask of padded captions. Output: their real tokens side by side, captions of one length after each
other; attention within each caption; and the states as padded rows again. Note: products and norms then compute real
tokens only, and captions of equal length attend in one call without a mask, so no token is ever padding. After Zeng et
al., "Boosting distributed training performance of the unpadded BERT model" (2022); ours needs no kernel of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from clasp.models.plain_attention import attend_to_all


@dataclass(frozen=True, slots=True)
class Packing:
    """The places of real tokens among padded rows, longest captions first; ``groups``: captions and their length."""

    rows: Int[Tensor, " T"]
    columns: Int[Tensor, " T"]
    groups: tuple[tuple[int, int], ...]

    def pack(self, padded: Shaped[Tensor, "B N"]) -> Shaped[Tensor, "1 T"]:
        """The real tokens of padded rows, as one row."""
        return padded[self.rows, self.columns][None]

    def unpack(self, states: Float[Tensor, "1 T D"], mask: Shaped[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """States of the real tokens as padded rows, zero where there is none; ``mask``: that of the rows."""
        padded = states.new_zeros(*mask.shape, states.shape[2])
        padded[self.rows, self.columns] = states[0]
        return padded

    def attend(
        self, q: Float[Tensor, "1 H T d"], k: Float[Tensor, "1 H T d"], v: Float[Tensor, "1 H T d"]
    ) -> Float[Tensor, "1 H T d"]:
        """Attention of every token to those of its own caption."""
        sizes = [captions * length for captions, length in self.groups]
        parts = zip(*(each[0].transpose(0, 1).split(sizes) for each in (q, k, v)), strict=True)
        attended = [
            attend_to_all(*(each.unflatten(0, shape).transpose(1, 2) for each in part))
            for shape, part in zip(self.groups, parts, strict=True)
        ]
        return torch.cat([each.transpose(1, 2).flatten(0, 1) for each in attended]).transpose(0, 1)[None]


def pack_rows(mask: Bool[Tensor, "B N"] | Int[Tensor, "B N"]) -> Packing:
    """The packing of rows with this attention mask, which may have padding on either side."""
    lengths = mask.sum(dim=1)
    falling, order = lengths.sort(descending=True, stable=True)
    places, columns = mask[order].nonzero(as_tuple=True)
    groups = [(len(list(equal)), length) for length, equal in groupby(falling.tolist()) if length]
    return Packing(order[places], columns, tuple(groups))
