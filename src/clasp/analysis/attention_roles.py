"""Roles of attention heads: whether a head attends alike in the image tower and in the text tower.

Input: two towers, and streams of their inputs. Output: the role of every head in each, and an ``AttentionAgreement``.
Note: MS-CLIP (You et al., ECCV 2022) finds attention patterns carried over from text to images where weights are
shared. Theirs is a measure of grounded phrases, ours needs no boxes: the entropy of a head's attention, and how much of
it stays at its own token (Clark et al., BlackboxNLP 2019, on heads of BERT), correlated over the heads of both towers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from clasp.analysis.attention_maps import NATIVE_ENCODERS, attention_maps
from clasp.models.length_buckets import split_by_length
from clasp.models.tower import Tower
from clasp.types import ImageInput, Pixels, TextInput, Tokens

_SHUFFLES = 1000  # random orders of heads that the range of the baseline is taken of
_ROWS = 8  # inputs in a pass: all maps of a pass are in memory
Roles = dict[int, Float[Tensor, "_ 2"]]
"""Layer to its heads: entropy of the attention by that of uniform attention, and the share at the own token"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionAgreement:
    """Correlation over all heads of what a head does with images and with texts, within layers.

    ``heads``: how many are paired. ``entropy``, ``own_token``: Pearson's, of the differences from the mean of the
    layer. ``…_shuffled``: lower and upper bound of 95 % of the same where the heads of a layer are paired at random.
    """

    heads: int
    entropy: float
    entropy_shuffled: list[float]
    own_token: float
    own_token_shuffled: list[float]


def head_roles(tower: Tower, stream: Iterable[tuple[Sequence[str], ImageInput | TextInput]]) -> Roles:
    """The mean role of every head over the real tokens of live inputs, prompts included, by layer from 0; none where
    the encoder of the tower is not native."""
    if not isinstance(tower.net, NATIVE_ENCODERS):
        return {}
    sums: dict[int, Tensor] = {}
    count = 0
    with torch.inference_mode():
        for _, inputs in stream:
            for part in _parts(inputs):
                maps = attention_maps(tower.net, lambda part=part: tower(part))
                mask = part.mask if isinstance(part, Tokens) else None
                for layer, weights in maps.items():
                    if mask is None:
                        seen = torch.ones(weights.shape[::2], dtype=torch.bool)
                    else:  # prompts come before the tokens
                        seen = F.pad(mask, (weights.shape[2] - mask.shape[1], 0), value=True)
                    total = sums.get(layer, torch.zeros(weights.shape[1], 2, dtype=torch.float64))
                    sums[layer] = total + _summed_roles(weights.double().cpu(), seen.cpu())
                count += len(next(iter(maps.values())))
    return {layer: total / count for layer, total in sorted(sums.items())}


def attention_agreement(image: Roles, text: Roles) -> AttentionAgreement | None:
    """The agreement over the layers that both have with equally many heads; ``None`` where there is none, or where the
    heads do not differ."""
    common = [layer for layer in image if layer in text and image[layer].shape == text[layer].shape]
    if not common:
        return None
    sides = [torch.stack([roles[layer] for layer in common]) for roles in (image, text)]
    one, other = (side - side.mean(dim=1, keepdim=True) for side in sides)  # [L H 2]
    norms = one.square().sum(dim=(0, 1)).sqrt() * other.square().sum(dim=(0, 1)).sqrt()
    if not (norms > 0).all():
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(_SHUFFLES, *one.shape[:2], generator=generator).argsort(dim=-1)
    permuted = other[torch.arange(len(other))[:, None], drawn]  # [S L H 2]
    shuffled = (one * permuted).sum(dim=(1, 2)) / norms
    low, high = shuffled.quantile(torch.tensor([0.025, 0.975], dtype=shuffled.dtype), dim=0).tolist()
    entropy, own = ((one * other).sum(dim=(0, 1)) / norms).tolist()
    return AttentionAgreement(
        heads=one.shape[0] * one.shape[1],
        entropy=entropy,
        entropy_shuffled=[low[0], high[0]],
        own_token=own,
        own_token_shuffled=[low[1], high[1]],
    )


# --- how -------------------------------------------------------------------------------------------------------------


def _parts(inputs: ImageInput | TextInput) -> list[Pixels | Tokens]:
    """A few rows at a time, of captions those of similar length."""
    assert isinstance(inputs, Pixels | Tokens), "attention is computed from live inputs"
    if isinstance(inputs, Pixels):
        return [Pixels(rows) for rows in inputs.values.split(_ROWS)]
    parts: list[Pixels | Tokens] = []
    for part in split_by_length(inputs)[0]:
        assert isinstance(part, Tokens)
        parts += map(Tokens, part.ids.split(_ROWS), part.mask.split(_ROWS))
    return parts


def _summed_roles(weights: Float[Tensor, "B H N N"], seen: Bool[Tensor, "B N"]) -> Float[Tensor, "H 2"]:
    """Entropy and own share of each head: the mean over the real queries of an input, summed over inputs."""
    keys = seen.sum(dim=1).double()
    entropy = torch.special.entr(weights).sum(dim=-1) / keys.log().clamp(min=1e-9)[:, None, None]
    own = weights.diagonal(dim1=-2, dim2=-1)
    both = torch.stack((entropy, own), dim=-1) * seen[:, None, :, None]
    return (both.sum(dim=2) / keys[:, None, None]).sum(dim=0)
