"""Contrastive losses: embeddings of a batch in, a number and its two directions out.

Pure functions with one signature (``clasp.types.Loss``). ``scale`` is the exponential of the learned log scale, so a
positive number. Unusual: a row may have several positives (other captions of its image, the same caption under
another image), told by ``groups``; and logits are float32 or better whatever the autocast state, because a bfloat16
logit of 100 is only known to half a unit. The B x B logits are built here in one piece; ``positives`` and the sums
below are written per row and column, so that they can be computed in tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clasp.types import Loss, LossParts


def positives(rows: Int[Tensor, "rows 2"], columns: Int[Tensor, "columns 2"]) -> Bool[Tensor, "rows columns"]:
    """Which rows and columns are positives of each other: those that agree in either number of their groups."""
    return (rows[:, None, 0] == columns[None, :, 0]) | (rows[:, None, 1] == columns[None, :, 1])


def info_nce(
    image: Float[Tensor, "B E"],
    text: Float[Tensor, "B E"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""] | None = None,
    *,
    groups: Int[Tensor, "B 2"] | None = None,
) -> LossParts:
    """Symmetric cross-entropy over the batch (CLIP, Radford et al. 2021, figure 3).

    The target of a row is uniform over its positives: the loss of a row is the log of the sum of its exponentiated
    logits minus the *mean* logit of its positives. Without ``groups`` the one positive is the diagonal. With m
    positives the smallest value of a row is log m, not 0, so losses of batches that repeat captions more or less are
    not comparable. ``bias`` is the same for every logit and cancels in the softmax.
    """
    logits = _logits(image, text, scale, bias)
    if groups is None:
        target = torch.arange(len(logits), device=logits.device)
    else:
        among = positives(groups, groups).to(logits.dtype)
        target = among / among.sum(dim=1, keepdim=True)
    image_to_text = F.cross_entropy(logits, target)
    text_to_image = F.cross_entropy(logits.T, target)  # being positives is mutual, so the target serves both ways
    return LossParts((image_to_text + text_to_image) / 2, image_to_text, text_to_image)


def sigmoid(
    image: Float[Tensor, "B E"],
    text: Float[Tensor, "B E"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""] | None = None,
    *,
    groups: Int[Tensor, "B 2"] | None = None,
) -> LossParts:
    """Every pair of the batch is a yes or no question (SigLIP, Zhai et al. 2023, eq. 1).

    Minus the sum over all B x B pairs of log sigmoid(z (scale x.y + bias)), divided by B; z is 1 for positives and -1
    for all others. Ours differs in that z is 1 for every pair that agrees in ``groups``, not on the diagonal only.
    A pair is asked once, whichever way one looks at it: the two directions and the total are the same number.
    """
    logits = _logits(image, text, scale, bias)
    if groups is None:
        positive = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    else:
        positive = positives(groups, groups)
    total = -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / len(logits)
    return LossParts(total, total, total)


def _logits(
    image: Float[Tensor, "B E"], text: Float[Tensor, "B E"], scale: Float[Tensor, ""], bias: Float[Tensor, ""] | None
) -> Float[Tensor, "B B"]:
    precise = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        logits = scale * (image.to(precise) @ text.to(precise).T)
        return logits if bias is None else logits + bias


LOSSES: dict[str, Loss] = {"infonce": info_nce, "sigmoid": sigmoid}
