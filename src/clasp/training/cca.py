"""Two linear heads in closed form: regularised canonical correlation analysis (CCA) of the features of frozen towers.

Input: standardised features of the pairs. Output: the two projections with maximal correlation; a second on a laptop
where gradient steps take a minute, without learning rate or seed. The ridge equals the variance of a noise: the
least-squares optimum under Gaussian noise of deviation s on both sides is that of adding s² to both covariances.
Source: Hotelling (1936); Vinod (1976) for the ridge. Weighting directions by a power of their correlation follows Gong
et al. (IJCV 2014, section 3.4), who use 4 where 1 was best here (``dev/LOG.md``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.types import UserError


@dataclass(frozen=True, slots=True)
class CCAProjections:
    """Two projection matrices into one space, by falling correlation."""

    image: Float[Tensor, "E Di"]
    text: Float[Tensor, "E Dt"]
    correlations: Float[Tensor, " E"]


def cca(
    pairs: Iterable[tuple[Float[Tensor, "B Di"], Float[Tensor, "B Dt"]]],
    width: int,
    *,
    ridge: tuple[float, float],
    power: float = 1.0,
) -> CCAProjections:
    """CCA of aligned batches of standardised features, ``width`` directions.

    Memory is that of the covariances; arithmetic in float64. Raises ``UserError`` when ``width`` exceeds the width of
    the narrower features. ``ridge`` (image, text) must be positive where there are fewer pairs than features.
    """
    image_image = image_text = text_text = torch.zeros(())
    count = 0
    for image, text in pairs:
        x, y = image.double(), text.double()
        image_image, image_text, text_text = image_image + x.T @ x, image_text + x.T @ y, text_text + y.T @ y
        count += len(x)
    narrower = min(image_text.shape)
    if width > narrower:
        raise UserError(f"head.width = {width}: the closed form has at most {narrower} directions for these towers")
    whiten_image, whiten_text = (
        _whitening(moments / count, penalty) for moments, penalty in ((image_image, ridge[0]), (text_text, ridge[1]))
    )
    u, correlations, v = torch.linalg.svd(whiten_image @ (image_text / count) @ whiten_text.T, full_matrices=False)
    weight = correlations[:width].clamp(min=0) ** power
    return CCAProjections(
        image=(weight[:, None] * (u.T[:width] @ whiten_image)).float(),
        text=(weight[:, None] * (v[:width] @ whiten_text)).float(),
        correlations=correlations[:width].float(),
    )


def _whitening(covariance: Float[Tensor, "D D"], ridge: float) -> Float[Tensor, "D D"]:
    """``W`` with ``W (covariance + ridge) Wᵀ = 1``."""
    ridged = covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky(ridged)
    return torch.linalg.solve_triangular(
        factor, torch.eye(len(factor), dtype=factor.dtype, device=factor.device), upper=False
    )
