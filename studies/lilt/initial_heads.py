"""Initial heads of all rows: closed-form CCA on the features of the base towers.

Input: towers and pairs. Output: linear heads written into a model, and a logit scale. Clasp can do the same at the
start of a run (``head.init = "cca"``), but would run both towers over the pairs in every cell; here it is done once for
all rows with the same initial features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.dual_encoder import DualEncoder
from clasp.training.cca import cca
from clasp.training.losses.contrastive import info_nce
from clasp.training.moments import PairMoments

SCALES = tuple(10 * 10 ** (step / 8) for step in range(9))  # 10 to 100, the maximum logit scale


@dataclass(frozen=True)
class Rows:
    """Aligned pooled features of pairs, one caption each, and the captions' texts."""

    image: Float[Tensor, "n Di"]
    text: Float[Tensor, "n Dt"]
    caption: tuple[str, ...]

    def and_those_of(self, other: Rows) -> Rows:
        """The concatenation with another."""
        image, text = torch.cat([self.image, other.image]), torch.cat([self.text, other.text])
        return Rows(image, text, self.caption + other.caption)


@dataclass(frozen=True)
class Start:
    """Weight and bias of both heads, and the log of the logit scale."""

    image: tuple[Tensor, Tensor]
    text: tuple[Tensor, Tensor]
    log_scale: Tensor

    def put(self, model: DualEncoder) -> None:
        """Copy into a model with linear heads."""
        with torch.no_grad():
            for head, (weight, bias) in ((model.image_head, self.image), (model.text_head, self.text)):
                assert isinstance(head.map, nn.Linear) and head.standardize is None
                head.map.weight.copy_(weight)
                head.map.bias.copy_(bias)
            assert model.log_scale is not None
            model.log_scale.copy_(self.log_scale)


def closed_form(pairs: Rows, held: Rows, *, width: int, ridge: tuple[float, float]) -> Start:
    """CCA of standardised features, folded into two linear layers.

    ``held`` are held-out pairs: the logit scale is the one of ``SCALES`` with their lowest InfoNCE loss.
    """
    stretched = [_standard(pairs.image), _standard(pairs.text)]
    apply = [(pairs.image * stretched[0][0] + stretched[0][1], pairs.text * stretched[1][0] + stretched[1][1])]
    maps = cca(PairMoments.of(apply), width, ridge=ridge)
    heads = [(w * scale, w @ shift) for w, (scale, shift) in zip((maps.image, maps.text), stretched, strict=True)]
    image, text = (
        F.normalize(F.linear(x, *head), dim=1) for x, head in zip((held.image, held.text), heads, strict=True)
    )
    losses = [_loss(image, text, held.caption, scale) for scale in SCALES]
    best = SCALES[min(range(len(SCALES)), key=losses.__getitem__)]
    return Start(heads[0], heads[1], torch.tensor(best).log())


def _standard(x: Float[Tensor, "n D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """The ``scale`` and ``shift`` that standardise each feature, as in ``models.heads.Standardize``."""
    deviation, mean = torch.std_mean(x.double(), dim=0, correction=0)
    scale = 1 / deviation.clamp(min=1e-3 * float(deviation.median()) + 1e-12)
    return scale.float(), (-mean * scale).float()


def _loss(image: Float[Tensor, "n E"], text: Float[Tensor, "n E"], caption: tuple[str, ...], scale: float) -> float:
    """Mean InfoNCE over batches of 64; equal captions are not negatives of each other."""
    parts = torch.arange(len(image)).split(64)
    total = 0.0
    number = {text: place for place, text in enumerate(dict.fromkeys(caption))}
    said = torch.tensor([number[text] for text in caption])
    for part in parts:
        groups = torch.stack([part, said[part]], dim=1)
        total += info_nce(image[part], text[part], torch.tensor(scale), groups=groups).total.item()
    return total / len(parts)
