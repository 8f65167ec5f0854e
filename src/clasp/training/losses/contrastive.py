"""Contrastive losses: embeddings of a batch in, a number and its two directions out.

One signature (``clasp.types.Loss``); ``LOSSES`` has a row for each. ``scale`` is the exponential of the learned log
scale, so a positive number. Note: the B x B logits never exist. They are made in tiles, once forward and once more
backward, so memory is O(B tile) for a third more arithmetic. A row may have several positives, told by ``groups``; a
batch may lie on several processes (``ProcessRing``); and logits are float32 or better whatever the autocast state,
because a bfloat16 logit of 100 is only known to half a unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from clasp.data.plugins import load_named
from clasp.training.losses.distributed import ProcessRing
from clasp.training.losses.tiles import RunningLogSumExp, dense_group_ids, iterate_logit_tiles
from clasp.types import LossParts


def info_nce(
    image: Float[Tensor, "B E"],
    text: Float[Tensor, "B E"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""] | None = None,
    *,
    groups: Int[Tensor, "B 2"] | None = None,
    ring: ProcessRing | None = None,
) -> LossParts:
    """Symmetric cross-entropy over the batch (CLIP, Radford et al. 2021, figure 3).

    The target of a row is uniform over its positives, the rows that agree with it in either column of ``groups``: the
    loss of a row is the log of the sum of its exponentiated logits minus the *mean* logit of its positives. Without
    ``groups`` the one positive is the diagonal. With m positives the smallest value of a row is log m, not 0, so
    losses of batches that repeat captions more or less are not comparable. ``bias`` is the same for every logit and
    cancels in the softmax. ``ring``: these rows are one process's part of a batch.
    """
    ring = ring or ProcessRing()
    with torch.autocast(image.device.type, enabled=False):
        image, text = _at_least_float32(image, text)
        parts = _InfoNCE.apply(scale * image, text, _batch_group_ids(groups, text, ring), ring)
    if bias is not None:  # its gradient is zero, not missing
        parts = [part + 0 * bias for part in parts]
    image_to_text, text_to_image = parts
    return LossParts((image_to_text + text_to_image) / 2, image_to_text, text_to_image)


def sigmoid_loss(
    image: Float[Tensor, "B E"],
    text: Float[Tensor, "B E"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""] | None = None,
    *,
    groups: Int[Tensor, "B 2"] | None = None,
    ring: ProcessRing | None = None,
) -> LossParts:
    """Every pair of the batch is a yes or no question (SigLIP, Zhai et al. 2023, eq. 1).

    Minus the sum over all B x B pairs of log sigmoid(z (scale x.y + bias)), divided by B; z is 1 for positives and -1
    for all others. Ours differs in that z is 1 for every pair that agrees in ``groups``, not on the diagonal only.
    A pair is asked once, whichever way one looks at it: the two directions and the total are the same number.
    ``ring``: these rows are one process's part of a batch.
    """
    ring = ring or ProcessRing()
    with torch.autocast(image.device.type, enabled=False):
        image, text = _at_least_float32(image, text)
        bias = image.new_zeros(()) if bias is None else bias.to(image.dtype)
        total = _Sigmoid.apply(scale * image, text, bias, _batch_group_ids(groups, text, ring), ring)
    return LossParts(total, total, total)


@dataclass(frozen=True, slots=True)
class LossMethod:
    """A row of ``LOSSES``, a ``Loss`` itself: the function, and where the bias of the logits starts.

    ``init_logit_bias=None``: the logits have no bias, and the function is called with ``bias=None``.
    """

    function: Callable[..., LossParts]
    init_logit_bias: float | None = None

    def __call__(
        self,
        image: Float[Tensor, "B E"],
        text: Float[Tensor, "B E"],
        scale: Float[Tensor, ""],
        bias: Float[Tensor, ""] | None = None,
        **options: Any,
    ) -> LossParts:
        return self.function(image, text, scale, bias, **options)


LOSSES: dict[str, LossMethod] = {
    "infonce": LossMethod(info_nce),
    # against the many negatives (Zhai et al., ICCV 2023, section 3.2); InfoNCE cannot see a bias
    "sigmoid": LossMethod(sigmoid_loss, init_logit_bias=-10.0),
}


def find_loss(kind: str) -> LossMethod:
    """The row of ``LOSSES``, or the function or ``LossMethod`` that ``package.module:Name`` names.

    Raises ``UserError`` for an unknown one.
    """
    found = load_named(kind, LOSSES, "loss.kind")
    return found if isinstance(found, LossMethod) else LossMethod(found)


class _InfoNCE(torch.autograd.Function):
    """Both directions, of image embeddings that carry the scale; keeps sums per row and column instead of logits.

    Backward takes a probability as exp(logit - top) / total, not as exp(logit - log-sum-exp): the latter is off by the
    rounding of a number as large as the scale.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, kin: Tensor, ring: ProcessRing) -> tuple[Tensor, Tensor]:
        rows, batch = len(image), len(image) * ring.size
        own = ring.rows_of(ring.rank, rows)
        row, column = RunningLogSumExp.empty(image, rows), RunningLogSumExp.empty(image, batch)
        counts, row_right, column_right = image.new_zeros(rows), image.new_zeros(rows), image.new_zeros(batch)
        for rank, visitor in ring.exchange(text):
            part = ring.rows_of(rank, rows)
            column_here, right_here = column.view(part), column_right[part]
            for r, c, logits, positive, spare in iterate_logit_tiles(image, visitor, kin[:, own], kin[:, part]):
                counts[r] += positive.sum(1)
                positive.mul_(logits)
                row_right[r] += positive.sum(1)
                right_here[c] += positive.sum(0)
                row.view(r).update(logits, 1, out=spare)
                column_here.view(c).update(logits, 0, out=logits)
        counts = ring.all_gather(counts)  # being positives is mutual, so a column has as many as its row
        top = ring.all_reduce_max(column.top.clone())
        column = RunningLogSumExp(top, ring.all_reduce_sum(column.total * (column.top - top).exp()))
        ctx.save_for_backward(image, text, kin, counts, *row, *column)
        ctx.ring = ring
        image_to_text = (row.top - row_right / counts[own] + row.total.log()).sum()
        text_to_image = (column.top - ring.all_reduce_sum(column_right) / counts + column.total.log()).sum()
        return ring.all_reduce_sum(image_to_text) / batch, text_to_image / batch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_text: Tensor, to_image: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        image, text, kin, counts, *sums = ctx.saved_tensors
        row, column, ring, rows = RunningLogSumExp(*sums[:2]), RunningLogSumExp(*sums[2:]), ctx.ring, len(image)
        own = ring.rows_of(ring.rank, rows)
        to_text, to_image = to_text / len(counts), to_image / len(counts)
        row_push, row_pull = (to_text / row.total)[:, None], (to_text / counts[own])[:, None]
        column_push, column_pull = to_image / column.total, to_image / counts
        for_image, for_text = torch.zeros_like(image), torch.zeros_like(text)
        with torch.autocast(image.device.type, enabled=False):
            for rank, visitor in ring.exchange(text):
                part = ring.rows_of(rank, rows)
                tops, push, pull = column.top[part], column_push[part], column_pull[part]
                for r, c, logits, positive, slope in iterate_logit_tiles(image, visitor, kin[:, own], kin[:, part]):
                    torch.sub(logits, row.top[r, None], out=slope).exp_().mul_(row_push[r])
                    slope.addcmul_(logits.sub_(tops[c]).exp_(), push[c])
                    slope.addcmul_(torch.add(row_pull[r], pull[c], out=logits), positive, value=-1)
                    for_image[r].addmm_(slope, visitor[c])
                    for_text[c].addmm_(slope.T, image[r])
                for_text = ring.send_to_next(for_text)
        return for_image, for_text, None, None


class _Sigmoid(torch.autograd.Function):
    """The sum over pairs of softplus(-z logit), divided by B, of image embeddings that carry the scale."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, bias: Tensor, kin: Tensor, ring: ProcessRing) -> Tensor:
        rows = len(image)
        own, sums = ring.rows_of(ring.rank, rows), []
        for rank, visitor in ring.exchange(text):
            for _, _, logits, positive, spare in iterate_logit_tiles(
                image, visitor, kin[:, own], kin[:, ring.rows_of(rank, rows)]
            ):
                wrong = logits.add_(bias).mul_(positive.mul_(-2).add_(1))
                # softplus(a) = log(1 + exp(-|a|)) + max(a, 0)
                sums.append(torch.abs(wrong, out=spare).neg_().exp_().log1p_().sum() + wrong.clamp_(min=0).sum())
        ctx.save_for_backward(image, text, bias, kin)
        ctx.ring = ring
        return ring.all_reduce_sum(torch.stack(sums).sum()) / (rows * ring.size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        image, text, bias, kin = ctx.saved_tensors
        ring, rows = ctx.ring, len(image)
        own = ring.rows_of(ring.rank, rows)
        for_image, for_text, for_bias = torch.zeros_like(image), torch.zeros_like(text), []
        with torch.autocast(image.device.type, enabled=False):
            for rank, visitor in ring.exchange(text):
                part = ring.rows_of(rank, rows)
                for r, c, logits, positive, _ in iterate_logit_tiles(image, visitor, kin[:, own], kin[:, part]):
                    sign = positive.mul_(-2).add_(1)
                    slope = logits.add_(bias).mul_(sign).sigmoid_().mul_(sign)
                    for_bias.append(slope.sum())
                    for_image[r].addmm_(slope, visitor[c])
                    for_text[c].addmm_(slope.T, image[r])
                for_text = ring.send_to_next(for_text)
        each = total / (rows * ring.size)
        return for_image.mul_(each), for_text.mul_(each), torch.stack(for_bias).sum() * each, None, None


def _batch_group_ids(
    groups: Int[Tensor, "B 2"] | None, rows: Tensor, ring: ProcessRing
) -> Float[Tensor, "kinds total"]:
    """That of the whole batch; without groups, everyone's place in it."""
    if groups is None:
        return torch.arange(len(rows) * ring.size, device=rows.device, dtype=rows.dtype)[None]
    return dense_group_ids(ring.all_gather(groups), rows.dtype)


def _at_least_float32(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    return image.to(dtype), text.to(dtype)
