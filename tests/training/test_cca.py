"""The closed form of two linear heads: against a slow obvious one, where the answer is known, and at its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clasp.training import cca as closed_form
from clasp.training.cca import CCAProjections, cca
from clasp.training.moments import PairMoments, combine_moments
from clasp.types import UserError


def some_pairs(count: int = 400, *, image: int = 9, text: int = 6, shared: int = 3) -> tuple[Tensor, Tensor]:
    """Standardised features that have ``shared`` causes in common, and otherwise their own."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cause = random(count, shared)
    sides = [cause @ random(shared, width) + random(count, width) @ random(width, width) for width in (image, text)]
    x, y = ((side - side.mean(0)) / side.std(0, correction=0) for side in sides)
    return x, y


def slowly(x: Tensor, y: Tensor, width: int, ridge: float) -> CCAProjections:
    """As the textbook has it: eigenvectors of (Cxx + r)^-1 Cxy (Cyy + r)^-1 Cyx, of unit length under Cxx + r."""
    n = len(x)
    cxx, cyy = (m.T @ m / n + ridge * torch.eye(m.shape[1], dtype=m.dtype) for m in (x, y))
    cxy = x.T @ y / n
    values, vectors = torch.linalg.eig(torch.linalg.inv(cxx) @ cxy @ torch.linalg.inv(cyy) @ cxy.T)
    order = values.real.argsort(descending=True)[:width]
    correlations, image = values.real[order].clamp(min=0).sqrt(), vectors.real[:, order]
    image = image / (image * (cxx @ image)).sum(0).sqrt()
    text = torch.linalg.inv(cyy) @ cxy.T @ image
    text = text / (text * (cyy @ text)).sum(0).sqrt()
    return CCAProjections(
        (correlations[:, None] * image.T).float(), (correlations[:, None] * text.T).float(), correlations.float()
    )


@pytest.mark.parametrize("ridge", [1e-9, 0.1, 1.0])
def test_equals_the_slow_obvious_way(ridge: float) -> None:
    x, y = some_pairs()
    fast, slow = cca(PairMoments.of([(x, y)]), 5, ridge=(ridge, ridge)), slowly(x, y, 5, ridge)
    torch.testing.assert_close(fast.correlations, slow.correlations, rtol=1e-4, atol=1e-5)
    signs = (fast.image * slow.image).sum(1).sign()  # a direction and its opposite are the same
    torch.testing.assert_close(fast.image, signs[:, None] * slow.image, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fast.text, signs[:, None] * slow.text, rtol=1e-3, atol=1e-4)


def test_finds_correlations_that_were_put_there() -> None:
    """y_i = c_i x_i + sqrt(1 - c_i^2) noise, both sides then mixed by matrices that CCA must see through."""
    wanted = torch.tensor([0.95, 0.6, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    white, _ = torch.linalg.qr(torch.randn(500, 6, generator=generator, dtype=torch.float64))
    x, noise = 500**0.5 * white[:, :3], 500**0.5 * white[:, 3:]  # exactly uncorrelated, variance 1
    y = wanted * x + (1 - wanted**2).sqrt() * noise
    mixed = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    maps = cca(PairMoments.of([(x @ mixed, y @ mixed.T)]), 3, ridge=(1e-10, 1e-10))
    torch.testing.assert_close(maps.correlations, wanted.float(), rtol=0, atol=1e-4)
    images, texts = (x @ mixed).float() @ maps.image.T, (y @ mixed.T).float() @ maps.text.T
    both = images.T @ texts / 500  # each direction is weighted by its correlation on either side
    torch.testing.assert_close(both, torch.diag(wanted**3).float(), rtol=0, atol=1e-3)


def test_batches_make_no_difference_and_few_directions_are_the_first_of_many() -> None:
    x, y = some_pairs()
    whole, parts = (
        cca(PairMoments.of([(x, y)]), 6, ridge=(0.5, 0.5)),
        cca(PairMoments.of(zip(x.split(77), y.split(77), strict=True)), 3, ridge=(0.5, 0.5)),
    )
    torch.testing.assert_close(parts.image, whole.image[:3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.text, whole.text[:3], rtol=1e-4, atol=1e-6)
    assert (whole.correlations.diff() <= 0).all()


def test_the_ridge_is_noise_of_that_variance() -> None:
    """Adding noise of deviation s to both sides, on average, is adding s^2 to both covariances."""
    x, y = some_pairs(300)
    generator = torch.Generator().manual_seed(1)
    noisy = [
        (x + 0.7 * torch.randn(x.shape, generator=generator), y + 0.7 * torch.randn(y.shape, generator=generator))
        for _ in range(300)
    ]
    by_noise, by_ridge = (
        cca(PairMoments.of(noisy), 3, ridge=(1e-9, 1e-9)),
        cca(PairMoments.of([(x, y)]), 3, ridge=(0.49, 0.49)),
    )
    torch.testing.assert_close(by_noise.correlations, by_ridge.correlations, rtol=0.02, atol=0.005)
    alike = torch.cosine_similarity(by_noise.image, by_ridge.image, dim=1).abs()
    assert alike[:2].min() > 0.99, alike


def test_fewer_pairs_than_features_need_the_ridge_and_do_not_overfit_with_it() -> None:
    x, y = some_pairs(12, image=40, text=30)
    maps = cca(PairMoments.of([(x, y)]), 10, ridge=(1.0, 1.0))
    assert maps.image.shape == (10, 40) and maps.text.shape == (10, 30)
    assert maps.image.isfinite().all() and maps.text.isfinite().all()
    assert maps.correlations.max() < 0.999, "twelve pairs always correlate fully without a ridge"


def test_more_directions_than_the_narrower_side_has_are_refused() -> None:
    x, y = some_pairs(image=9, text=6)
    with pytest.raises(UserError, match=r"head.width = 7: the closed form has at most 6 directions"):
        cca(PairMoments.of([(x, y)]), 7, ridge=(1.0, 1.0))


def _paths() -> dict[str, tuple[PairMoments, int | None, int]]:
    """The moments, rows and ``WIDE`` with which each way of computing a CCA is taken."""
    x, y = some_pairs()
    generator = torch.Generator().manual_seed(5)
    few = torch.randn(20, 600, generator=generator), torch.randn(20, 520, generator=generator)
    return {
        "dense": (PairMoments.of([(x, y)]), None, 10_000),
        "wide": (PairMoments.of([(x, y)]), None, 4),
        "wide texts": (PairMoments.of([(y, x)]), None, 4),
        "few": (PairMoments.of([few]), 20, 10_000),
    }


@pytest.mark.parametrize("path", ["dense", "wide", "wide texts", "few"])
def test_powers_weight_the_directions_of_each_side(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moments, rows, wide = _paths()[path]
    monkeypatch.setattr(closed_form, "WIDE", wide)
    plain, weighted = (
        cca(moments, 4, ridge=(0.1, 0.1), powers=powers, rows=rows) for powers in ((0.0, 0.0), (0.5, 2.0))
    )
    for power, of_plain, of_weighted in ((0.5, plain.image, weighted.image), (2.0, plain.text, weighted.text)):
        expected = plain.correlations[:, None] ** power * of_plain
        torch.testing.assert_close(of_weighted, expected, rtol=1e-4, atol=1e-6)


def test_powers_of_the_same_sum_give_the_same_products() -> None:
    x, y = some_pairs()
    even, uneven = (
        cca(PairMoments.of([(x, y)]), 4, ridge=(0.1, 0.1), powers=powers) for powers in ((1.0, 1.0), (0.5, 1.5))
    )
    torch.testing.assert_close(uneven.image.T @ uneven.text, even.image.T @ even.text, rtol=1e-4, atol=1e-6)


# --- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
def test_images_with_several_captions_are_those_pairs(most: int) -> None:
    generator = torch.Generator().manual_seed(3)
    images, counts = torch.randn(20, 9, generator=generator), torch.arange(20) % most + 1
    parts = [torch.arange(20)[counts > draw] for draw in range(most)]
    texts = [torch.randn(len(rows), 6, generator=generator) for rows in parts]
    made = PairMoments.empty(9, 6)
    made.add_captions(images, counts, zip(parts, texts, strict=True))
    expected = PairMoments.of((images[rows], text) for rows, text in zip(parts, texts, strict=True))
    for name in ("weight", "image", "text", "image_image", "image_text", "text_text"):
        found, wanted = (torch.as_tensor(getattr(each, name)) for each in (made, expected))
        if most == 1:
            assert torch.equal(found, wanted), "to the last bit"
        torch.testing.assert_close(found, wanted)


def test_selected_columns_are_the_moments_of_those_columns() -> None:
    x, y = some_pairs()
    image, text = torch.tensor([1, 2, 7]), torch.tensor([0, 5])
    chosen, alone = PairMoments.of([(x, y)]).select(image, text), PairMoments.of([(x[:, image], y[:, text])])
    for name in ("image", "text", "image_image", "image_text", "text_text"):
        torch.testing.assert_close(getattr(chosen, name), getattr(alone, name))
    assert chosen.weight == alone.weight == 400


def test_weights_are_repetitions_and_centring_is_on_the_weighted_mean() -> None:
    x, y = (side + 3 for side in some_pairs(50))
    repeats = torch.arange(50) % 3
    weighted = PairMoments.empty(9, 6)
    weighted.add(x, y, repeats.double())
    again = PairMoments.of([(x.repeat_interleave(repeats, 0), y.repeat_interleave(repeats, 0))])
    assert weighted.weight == again.weight
    torch.testing.assert_close(weighted.image_text, again.image_text)
    rows, columns = x.repeat_interleave(repeats, 0), y.repeat_interleave(repeats, 0)
    expected = (rows - rows.mean(0)).T @ (columns - columns.mean(0))
    torch.testing.assert_close(weighted.centred().image_text, expected)
    torch.testing.assert_close(weighted.centred().image, torch.zeros(9, dtype=torch.float64))


def test_combined_sources_are_each_centred_on_their_own_mean_and_count_by_their_weight() -> None:
    x, y = some_pairs(200)
    one, other = PairMoments.of([(x[:150] + 5, y[:150] - 2)]), PairMoments.of([(x[150:] - 9, y[150:] + 1)])
    both = combine_moments([(one, 1.0), (other, 3.0)])
    expected = 0.25 * torch.cov(x[:150].T, correction=0) + 0.75 * torch.cov(x[150:].T, correction=0)
    torch.testing.assert_close(both.image_image, expected)
    assert both.weight == 1


@pytest.mark.parametrize("sides", [(9, 6), (6, 9)])
def test_wide_features_give_the_same_maps(sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = some_pairs(image=sides[0], text=sides[1])
    ridge = (torch.linspace(0.5, 2, sides[0], dtype=torch.float64), 0.3)
    narrow = cca(PairMoments.of([(x, y)]), 5, ridge=ridge)
    monkeypatch.setattr(closed_form, "WIDE", 4)
    wide = cca(PairMoments.of([(x, y)]), 5, ridge=ridge)
    torch.testing.assert_close(wide.correlations, narrow.correlations, rtol=1e-4, atol=1e-5)
    signs = (wide.image * narrow.image).sum(1).sign()
    torch.testing.assert_close(wide.image, signs[:, None] * narrow.image, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(wide.text, signs[:, None] * narrow.text, rtol=1e-3, atol=1e-4)


def test_a_ridge_for_each_column_is_a_column_scaled() -> None:
    """Dividing a column by c is multiplying its ridge by c squared; the maps differ by the factor only."""
    x, y = some_pairs()
    factor = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    plain = cca(PairMoments.of([(x, y)]), 4, ridge=(factor**2, 0.5))
    scaled = cca(PairMoments.of([(x / factor, y)]), 4, ridge=(1.0, 0.5))
    torch.testing.assert_close(plain.correlations, scaled.correlations)
    signs = (plain.text * scaled.text).sum(1).sign()
    torch.testing.assert_close(plain.image, signs[:, None] * scaled.image / factor.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ridge", [1.0, torch.linspace(0.5, 2.0, 600)], ids=["one", "of each column"])
def test_few_pairs_are_computed_in_their_own_space(ridge: float | Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(20, 600, generator=generator), torch.randn(20, 520, generator=generator)
    moments = PairMoments.of([(x - x.mean(0), y - y.mean(0))])
    dense = cca(moments, 64, ridge=(ridge, 1.0))
    monkeypatch.setattr(closed_form, "_whitening", None)
    few = cca(moments, 64, ridge=(ridge, 1.0), rows=20)
    assert few.image.shape == (64, 600) and few.text.shape == (64, 520)
    assert (few.correlations[19:] == 0).all() and (few.image[19:] == 0).all(), "19 directions of 20 centred pairs"
    torch.testing.assert_close(few.correlations, dense.correlations, rtol=1e-5, atol=1e-6)
    signs = (few.image[:19] * dense.image[:19]).sum(1).sign()
    torch.testing.assert_close(few.image[:19], signs[:, None] * dense.image[:19], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(few.text[:19], signs[:, None] * dense.text[:19], rtol=1e-3, atol=1e-5)


def test_moments_of_more_pairs_than_named_are_computed_as_ever() -> None:
    x, y = torch.randn(200, 600), torch.randn(200, 520)
    moments = PairMoments.of([(x, y)])
    torch.testing.assert_close(
        cca(moments, 8, ridge=(1.0, 1.0), rows=20).image, cca(moments, 8, ridge=(1.0, 1.0)).image
    )
