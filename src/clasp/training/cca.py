"""Two linear heads in closed form: regularised canonical correlation analysis (CCA) of the features of frozen towers.

Input: the moments of standardised features of the pairs. Output: the two projections with maximal correlation; a
second on a laptop where gradient steps take a minute, without learning rate or seed. The ridge equals the variance of a
noise: the least-squares optimum under Gaussian noise of deviation s on both sides is that of adding s² to both
covariances. Source: Hotelling (1936); Vinod (1976) for the ridge. Weighting directions by a power of their correlation
follows Gong et al. (IJCV 2014, section 3.4), who use 4 on both sides where 1 was best here (``dev/LOG.md``). Unequal
powers of the same sum leave the products of embeddings as they are, and change what unit length divides them by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.training.moments import WIDE, PairMoments
from clasp.types import UserError

Ridge = float | Float[Tensor, " D"]
"""A ridge penalty: one for a side, or one of each column (as where every layer has its own)"""

_FEW_ROWS_WIDTH = 512  # columns of the narrower side from which few pairs are computed in their own space
_RANK_TOLERANCE = 1e-6  # of the largest variance: products of a wide side are float32
_SUBSPACE_ITERATIONS = 24  # the error of a direction falls by the ratio of its squared correlation to those left out


@dataclass(frozen=True, slots=True)
class CCAProjections:
    """Two projection matrices into one space, by falling correlation."""

    image: Float[Tensor, "E Di"]
    text: Float[Tensor, "E Dt"]
    correlations: Float[Tensor, " E"]


def cca(
    moments: PairMoments,
    width: int,
    *,
    ridge: tuple[Ridge, Ridge],
    powers: tuple[float, float] = (1.0, 1.0),
    rows: int | None = None,
) -> CCAProjections:
    """CCA of standardised features from their moments, ``width`` directions.

    The moments are used as they are: about zero, the mean that standardisation has set, unless they were centred.
    ``ridge`` (image, text), one value or one of each column, must be positive where there are fewer pairs than
    features. ``powers`` (image, text) of its correlation weight a direction. ``rows``: how many pairs the moments are
    sums of, where that is known; of few, the same is computed in their space. Raises ``UserError`` when ``width``
    exceeds the width of the narrower features. Arithmetic in float64; sides of more than ``WIDE`` columns are factored
    in float32, in a few seconds for 10,000 columns.
    """
    narrower = min(moments.image_text.shape)
    if width > narrower:
        raise UserError(f"head.width = {width}: the closed form has at most {narrower} directions for these towers")
    if rows is not None and narrower >= _FEW_ROWS_WIDTH and rows <= narrower // 4:
        found = _cca_of_few(moments, width, ridge, powers, rows)
        if found is not None:
            return found
    if max(moments.image_text.shape) > WIDE:
        return _cca_of_wide(moments, width, ridge, powers)
    whiten_image, whiten_text = (
        _whitening(products / moments.weight, penalty)
        for products, penalty in ((moments.image_image, ridge[0]), (moments.text_text, ridge[1]))
    )
    across = moments.image_text / moments.weight
    u, correlations, v = torch.linalg.svd(whiten_image @ across @ whiten_text.T, full_matrices=False)
    at_image, at_text = (correlations[:width, None].clamp(min=0) ** power for power in powers)
    return CCAProjections(
        image=(at_image * (u.T[:width] @ whiten_image)).float(),
        text=(at_text * (v[:width] @ whiten_text)).float(),
        correlations=correlations[:width].float(),
    )


def _cca_of_few(
    moments: PairMoments, width: int, ridge: tuple[Ridge, Ridge], powers: tuple[float, float], rows: int
) -> CCAProjections | None:
    """The same from factors of as many rows as there are pairs: directions beyond these have correlation 0, and rows of
    zeros. ``None`` where the moments are not of so few pairs."""
    sides = []
    for products, penalty in ((moments.image_image, ridge[0]), (moments.text_text, ridge[1])):
        scale = torch.as_tensor(penalty, dtype=torch.float64, device=products.device).rsqrt().expand(len(products))
        factor = _pivoted_cholesky(products.double() / moments.weight, rows)
        if factor is None:
            return None
        values, vectors = torch.linalg.eigh((factor * scale) @ (factor * scale).T)
        kept = values > values[-1] * _RANK_TOLERANCE
        values, vectors = values[kept], vectors[:, kept]
        basis = (vectors / values.sqrt()).T @ (factor * scale)  # orthonormal rows: the space of the pairs
        sides.append((basis * scale) / (values + 1).sqrt()[:, None])  # and whitened there
    image, text = sides
    u, correlations, v = torch.linalg.svd(image @ (moments.image_text.double() / moments.weight) @ text.T)
    count = min(width, len(correlations))
    weights = [correlations[:count, None].clamp(min=0) ** power for power in powers]
    maps = [
        torch.nn.functional.pad(weight * (vectors[:count] @ side), (0, 0, 0, width - count)).float()
        for weight, vectors, side in zip(weights, (u.T, v), (image, text), strict=True)
    ]
    padded = torch.nn.functional.pad(correlations[:count], (0, width - count)).float()
    return CCAProjections(maps[0], maps[1], padded)


def _pivoted_cholesky(matrix: Float[Tensor, "D D"], rank: int) -> Float[Tensor, "_ D"] | None:
    """``G`` of at most ``rank`` rows with ``Gᵀ G = matrix`` (Higham, 1990); ``None`` where the rank is higher."""
    left = matrix.diagonal().clone()
    most = float(left.max())
    factor = torch.zeros(rank, len(matrix), dtype=matrix.dtype, device=matrix.device)
    for row in range(rank):
        pivot = int(left.argmax())
        if left[pivot] <= _RANK_TOLERANCE * most:
            return factor[:row]
        factor[row] = (matrix[pivot] - factor[:row, pivot] @ factor[:row]) / left[pivot].sqrt()
        left -= factor[row] ** 2
    return factor if float(left.max()) <= 1e-4 * most else None


def _cca_of_wide(
    moments: PairMoments, width: int, ridge: tuple[Ridge, Ridge], powers: tuple[float, float]
) -> CCAProjections:
    """The same without an inverse: triangular solves, and leading eigenvectors of the smaller Gram matrix."""
    image, text = (
        torch.linalg.cholesky(_ridged((products / moments.weight).float(), penalty))
        for products, penalty in ((moments.image_image, ridge[0]), (moments.text_text, ridge[1]))
    )
    half = torch.linalg.solve_triangular(image, (moments.image_text / moments.weight).float(), upper=False)
    correlated = torch.linalg.solve_triangular(text, half.T, upper=False).T  # Di Dt
    tall = correlated.shape[0] >= correlated.shape[1]
    long, factors = (correlated, (image, text)) if tall else (correlated.T, (text, image))
    squares, near = _leading_eigenvectors(long.T @ long, width)
    correlations = squares.clamp(min=0).sqrt()
    far = long @ near / correlations.clamp(min=1e-6)
    maps = [
        torch.linalg.solve_triangular(factor.T, vectors, upper=True).T
        for factor, vectors in zip(factors, (far, near), strict=True)
    ]
    image, text = (
        correlations[:, None] ** power * each
        for power, each in zip(powers, maps if tall else reversed(maps), strict=True)
    )
    return CCAProjections(image, text, correlations)


def _leading_eigenvectors(
    gram: Float[Tensor, "D D"], count: int
) -> tuple[Float[Tensor, " count"], Float[Tensor, "D count"]]:
    """The largest eigenvalues, falling, and their vectors, by orthogonal iteration on a subspace half as wide again.

    Golub & Van Loan, Matrix Computations, section 8.2.4. The whole decomposition takes ten times as long.
    """
    block = min(len(gram), count + count // 2 + 32)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(gram), block, generator=generator).to(gram)
    for _ in range(_SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(gram @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ gram @ basis)
    return values.flip(0)[:count], (basis @ vectors).flip(1)[:, :count]


def _whitening(covariance: Float[Tensor, "D D"], ridge: Ridge) -> Float[Tensor, "D D"]:
    """``W`` with ``W (covariance + ridge) Wᵀ = 1``."""
    factor = torch.linalg.cholesky(_ridged(covariance, ridge))
    return torch.linalg.solve_triangular(
        factor, torch.eye(len(factor), dtype=factor.dtype, device=factor.device), upper=False
    )


def _ridged(covariance: Float[Tensor, "D D"], ridge: Ridge) -> Float[Tensor, "D D"]:
    """The covariance with the ridge added to its diagonal, in place."""
    covariance.diagonal().add_(torch.as_tensor(ridge, dtype=covariance.dtype, device=covariance.device))
    return covariance
