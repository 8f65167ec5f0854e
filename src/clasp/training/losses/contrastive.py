"""Contrastive losses: InfoNCE and the pairwise sigmoid loss, over the embeddings of a batch.

One signature (``clasp.types.Loss``); ``LOSSES`` has a row for each. ``scale`` is the logit scale, the exponential of
the learned log scale. Note: the B x B logits of a large batch are never materialised. They are computed in tiles, once
forward and once more backward, so memory is O(B tile) for a third more arithmetic; InfoNCE of a batch of one tile, up
to twice the width of the embeddings, computes them once and keeps three matrices of their size. A row may have several
positives, given by ``groups``; and logits are at least float32 whatever the autocast state, because a bfloat16 logit of
100 has a resolution of half a unit. A batch on several processes is gathered before (``training.batch_parts``).
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
from clasp.training.losses.tiles import RunningLogSumExp, dense_group_ids, iterate_logit_tiles, tile_size
from clasp.types import LossParts


def info_nce(
    image: Float[Tensor, "B E"],
    text: Float[Tensor, "B E"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""] | None = None,
    *,
    groups: Int[Tensor, "B 2"] | None = None,
) -> LossParts:
    """Symmetric cross-entropy over the batch (CLIP, Radford et al. 2021, figure 3).

    The target of a row is uniform over its positives, the rows equal to it in either column of ``groups``: the loss of
    a row is the log-sum-exp of its logits minus the *mean* logit of its positives. Without ``groups`` the diagonal is
    the only positive. With m positives the minimum of a row is log m, not 0, so losses of batches with different
    numbers of repeated captions are not comparable. ``bias`` is equal for all logits and cancels in the softmax.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = _at_least_float32(image, text)
        one_tile = 0 < len(image) <= min(tile_size(image.device), 2 * image.shape[1])  # so keeps O(B E)
        function = _InfoNCEOfOneTile if one_tile else _InfoNCE
        parts = function.apply(scale * image, text, _batch_group_ids(groups, text))
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
) -> LossParts:
    """Binary cross-entropy over all image-text pairs of the batch (SigLIP, Zhai et al. 2023, eq. 1).

    Minus the sum over all B x B pairs of log sigmoid(z (scale x.y + bias)), divided by B; z is 1 for positives and -1
    for negatives. Ours differs in that z is 1 for every pair that is equal in ``groups``, not on the diagonal only. The
    loss is symmetric: both directions and the total are the same number.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = _at_least_float32(image, text)
        bias = image.new_zeros(()) if bias is None else bias.to(image.dtype)
        total = _Sigmoid.apply(scale * image, text, bias, _batch_group_ids(groups, text))
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
    """Both directions, of image embeddings multiplied by the scale; saves sums per row and column instead of logits.

    Backward computes a probability as exp(logit - top) / total, not as exp(logit - log-sum-exp): the latter has the
    rounding error of a number as large as the scale.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
        text = text.contiguous()
        row, column = RunningLogSumExp.empty(image, len(image)), RunningLogSumExp.empty(image, len(image))
        counts, row_positive, column_positive = image.new_zeros(3, len(image))
        for r, c, logits, positive, scratch in iterate_logit_tiles(image, text, group_ids, group_ids):
            counts[r] += positive.sum(1)
            positive.mul_(logits)
            row_positive[r] += positive.sum(1)
            column_positive[c] += positive.sum(0)
            row.view(r).update(logits, 1, out=scratch)
            column.view(c).update(logits, 0, out=logits)
        ctx.save_for_backward(image, text, group_ids, counts, *row, *column)
        image_to_text = (row.top - row_positive / counts + row.total.log()).sum()
        # positives are symmetric, so a column has as many as its row
        text_to_image = (column.top - column_positive / counts + column.total.log()).sum()
        return image_to_text / len(image), text_to_image / len(image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_text: Tensor, to_image: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        image, text, group_ids, counts, *sums = ctx.saved_tensors
        row, column = RunningLogSumExp(*sums[:2]), RunningLogSumExp(*sums[2:])
        to_text, to_image = to_text / len(counts), to_image / len(counts)
        row_softmax, row_target = (to_text / row.total)[:, None], (to_text / counts)[:, None]
        column_softmax, column_target = to_image / column.total, to_image / counts
        grad_image, grad_text = torch.zeros_like(image), torch.zeros_like(text)
        with torch.autocast(image.device.type, enabled=False):
            for r, c, logits, positive, grad in iterate_logit_tiles(image, text, group_ids, group_ids):
                torch.sub(logits, row.top[r, None], out=grad).exp_().mul_(row_softmax[r])
                grad.addcmul_(logits.sub_(column.top[c]).exp_(), column_softmax[c])
                grad.addcmul_(torch.add(row_target[r], column_target[c], out=logits), positive, value=-1)
                grad_image[r].addmm_(grad, text[c])
                grad_text[c].addmm_(grad.T, image[r])
        return grad_image, grad_text, None


class _InfoNCEOfOneTile(torch.autograd.Function):
    """``_InfoNCE`` of a batch whose logits are one tile, to the same bits: keeps the exponentials in the buffers of the
    tile, in place of logits that are computed again."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
        text = text.contiguous()
        ((_, _, logits, positive, scratch),) = iterate_logit_tiles(image, text, group_ids, group_ids)
        counts, weighted = positive.sum(1), torch.mul(positive, logits, out=scratch)
        row_positive, column_positive = weighted.sum(1), weighted.sum(0)
        row_top, column_top = logits.amax(1), logits.amax(0)
        row = torch.sub(logits, row_top[:, None], out=scratch).exp_()
        column = logits.sub_(column_top).exp_()
        row_total, column_total = row.sum(1), column.sum(0)
        ctx.save_for_backward(image, text, positive, counts, row, column, row_total, column_total)
        image_to_text = (row_top - row_positive / counts + row_total.log()).sum()
        text_to_image = (column_top - column_positive / counts + column_total.log()).sum()
        return image_to_text / len(image), text_to_image / len(image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_text: Tensor, to_image: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        image, text, positive, counts, row, column, row_total, column_total = ctx.saved_tensors
        to_text, to_image = to_text / len(counts), to_image / len(counts)
        with torch.autocast(image.device.type, enabled=False):
            grad = (row * (to_text / row_total)[:, None]).addcmul_(column, to_image / column_total)
            grad.addcmul_((to_text / counts)[:, None] + to_image / counts, positive, value=-1)
            return torch.zeros_like(image).addmm_(grad, text), torch.zeros_like(text).addmm_(grad.T, image), None


class _Sigmoid(torch.autograd.Function):
    """The sum over pairs of softplus(-z logit), divided by B, of image embeddings multiplied by the scale."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, bias: Tensor, group_ids: Tensor) -> Tensor:
        text, sums = text.contiguous(), []
        for _, _, logits, positive, scratch in iterate_logit_tiles(image, text, group_ids, group_ids):
            wrong = logits.add_(bias).mul_(positive.mul_(-2).add_(1))
            # softplus(a) = log(1 + exp(-|a|)) + max(a, 0)
            sums.append(torch.abs(wrong, out=scratch).neg_().exp_().log1p_().sum() + wrong.clamp_(min=0).sum())
        ctx.save_for_backward(image, text, bias, group_ids)
        return torch.stack(sums).sum() / len(image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        image, text, bias, group_ids = ctx.saved_tensors
        grad_image, grad_text, grad_bias = torch.zeros_like(image), torch.zeros_like(text), []
        with torch.autocast(image.device.type, enabled=False):
            for r, c, logits, positive, _ in iterate_logit_tiles(image, text, group_ids, group_ids):
                sign = positive.mul_(-2).add_(1)
                grad = logits.add_(bias).mul_(sign).sigmoid_().mul_(sign)
                grad_bias.append(grad.sum())
                grad_image[r].addmm_(grad, text[c])
                grad_text[c].addmm_(grad.T, image[r])
        each = total / len(image)
        return grad_image.mul_(each), grad_text.mul_(each), torch.stack(grad_bias).sum() * each, None


def _batch_group_ids(groups: Int[Tensor, "B 2"] | None, rows: Tensor) -> Float[Tensor, "kinds B"]:
    """Group ids of the batch; without groups, the row numbers."""
    if groups is None:
        return torch.arange(len(rows), device=rows.device, dtype=rows.dtype)[None]
    return dense_group_ids(groups, rows.dtype)


def _at_least_float32(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    return image.to(dtype), text.to(dtype)
