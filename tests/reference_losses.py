"""The losses as one would write them down, with all B x B logits in memory: what the tiled ones are held to.

Same arguments as ``clasp.training.losses``, without a ring; plain autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def positives(groups, length):
    """A boolean B x B table."""
    if groups is None:
        return torch.eye(length, dtype=torch.bool)
    return (groups[:, None, 0] == groups[None, :, 0]) | (groups[:, None, 1] == groups[None, :, 1])


def logits_of(image, text, scale, bias):
    precise = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    logits = scale * (image.to(precise) @ text.to(precise).T)
    return logits if bias is None else logits + bias


def naive_info_nce(image, text, scale, bias=None, *, groups=None):
    logits = logits_of(image, text, scale, bias)
    if groups is None:
        target = torch.arange(len(logits))
    else:
        target = positives(groups, len(logits)).to(logits.dtype)
        target = target / target.sum(1, keepdim=True)
    there, back = F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)
    return (there + back) / 2, there, back


def naive_sigmoid(image, text, scale, bias=None, *, groups=None):
    logits = logits_of(image, text, scale, bias)
    signed = torch.where(positives(groups, len(logits)), logits, -logits)
    total = -F.logsigmoid(signed).sum() / len(logits)
    return total, total, total


NAIVE = {"infonce": naive_info_nce, "sigmoid": naive_sigmoid}
