"""The B x B logits of a batch, one tile at a time.

Input: image embeddings multiplied by the scale, text embeddings, and the group ids of each. Output: tiles of logits
with the mask of positives, and running log-sum-exps to accumulate them. Note: all tile-sized results are written to
three preallocated buffers, and every operation on them is float to float: on a CPU, comparing two float columns into a
float tensor takes a tenth of the time of a boolean mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Rows and columns of a tile. CPU: for forward and backward at B = 4096 and 8192, E = 512, one and two threads (medians
# of three alternating runs), 512, 1024 and 2048 take the same time within noise, and 256 up to a tenth longer. Three
# buffers of 1024 are 12 MB, which still fits into a shared cache.
TILE_SIZE_CPU = 1024
# Elsewhere a tile must fill the device: at 4096 a matmul has 1024 blocks of 128 x 128. Reasoned, not yet measured.
TILE_SIZE_GPU = 4096


def tile_size(device: torch.device) -> int:
    """The rows and the columns of a tile at most."""
    return TILE_SIZE_CPU if device.type == "cpu" else TILE_SIZE_GPU


class LogitTile(NamedTuple):
    """A tile of the logits. All three tensors may be modified in place; the next tile overwrites them."""

    rows: slice
    columns: slice
    logits: Float[Tensor, "r c"]
    positive: Float[Tensor, "r c"]
    """1 for positives, 0 for the others"""
    scratch: Float[Tensor, "r c"]


def iterate_logit_tiles(
    image: Float[Tensor, "rows E"],
    text: Float[Tensor, "columns E"],
    row_groups: Float[Tensor, "kinds rows"],
    column_groups: Float[Tensor, "kinds columns"],
) -> Iterator[LogitTile]:
    """All tiles of image @ text.T, with positives by the ids of ``dense_group_ids``."""
    size = tile_size(image.device)
    buffers = image.new_empty(3, min(size, len(image)) * min(size, len(text)))
    for top in range(0, len(image), size):
        rows = slice(top, top + size)
        for left in range(0, len(text), size):
            columns = slice(left, left + size)
            x, y = image[rows], text[columns]
            logits, positive, scratch = buffers[:, : len(x) * len(y)].view(3, len(x), len(y)).unbind()
            torch.eq(row_groups[0, rows, None], column_groups[0, columns], out=positive)
            for row_ids, column_ids in zip(row_groups[1:, rows], column_groups[1:, columns], strict=True):
                torch.maximum(positive, torch.eq(row_ids[:, None], column_ids, out=scratch), out=positive)
            yield LogitTile(rows, columns, torch.mm(x, y.T, out=logits), positive, scratch)


def dense_group_ids(groups: Int[Tensor, "B kinds"], dtype: torch.dtype) -> Float[Tensor, "kinds B"]:
    """Group ids renumbered from 0 in each column, as floats (exact up to 2**24 rows). Rows equal in one are
    positives."""
    ordered, order = groups.sort(dim=0)
    number = F.pad((ordered[1:] != ordered[:-1]).cumsum(0), (0, 0, 1, 0))
    return torch.empty_like(number).scatter_(0, order, number).T.to(dtype).contiguous()


class RunningLogSumExp(NamedTuple):
    """Running log-sum-exps as exp(top) * total: logits span up to twice the scale, so a fixed top would overflow."""

    top: Float[Tensor, " B"]
    total: Float[Tensor, " B"]

    @classmethod
    def empty(cls, like: Tensor, length: int) -> RunningLogSumExp:
        return cls(like.new_full((length,), -torch.inf), like.new_zeros(length))

    def view(self, where: slice) -> RunningLogSumExp:
        return RunningLogSumExp(self.top[where], self.total[where])

    def update(self, logits: Float[Tensor, "r c"], dim: int, *, out: Float[Tensor, "r c"]) -> None:
        """Accumulates logits along ``dim``; ``out`` is overwritten and may be the logits."""
        top = torch.maximum(self.top, logits.amax(dim))
        torch.sub(logits, top.unsqueeze(dim), out=out).exp_()
        self.total.mul_((self.top - top).exp_()).add_(out.sum(dim))
        self.top.copy_(top)
