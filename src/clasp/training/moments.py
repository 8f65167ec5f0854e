"""First and second moments of aligned features: all that the closed form of two linear heads needs of the pairs.

Input: batches of aligned image and text features, each row with a weight. Output: ``PairMoments``: weighted count, sums
and sums of products, from which columns can be selected, which can be centred, and which can be combined with those of
other sources. Note: sums are float64; where a side has more than ``WIDE`` columns, the products of a batch are computed
in float32 (relative error about 1e-7 of a variance), which takes half the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

WIDE = 4096
"""Columns of a side above which products and factors are computed in float32"""


@dataclass(slots=True)
class PairMoments:
    """Weighted sums over aligned pairs: ``weight`` their total weight, then of the features and of their products."""

    weight: float
    image: Float[Tensor, " Di"]
    text: Float[Tensor, " Dt"]
    image_image: Float[Tensor, "Di Di"]
    image_text: Float[Tensor, "Di Dt"]
    text_text: Float[Tensor, "Dt Dt"]

    @classmethod
    def empty(cls, image_width: int, text_width: int, device: str | torch.device = "cpu") -> PairMoments:
        """Moments of no pairs yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        squares = zeros(image_width, image_width), zeros(image_width, text_width), zeros(text_width, text_width)
        return cls(0.0, zeros(image_width), zeros(text_width), *squares)

    @classmethod
    def of(cls, batches: Iterable[tuple[Float[Tensor, "B Di"], Float[Tensor, "B Dt"]]]) -> PairMoments:
        """Moments of batches of aligned features, every pair with weight 1."""
        moments: PairMoments | None = None
        for image, text in batches:
            moments = moments or cls.empty(image.shape[1], text.shape[1], image.device)
            moments.add(image, text)
        assert moments is not None, "there are no pairs"
        return moments

    def add(
        self,
        image: Float[Tensor, "B Di"],
        text: Float[Tensor, "B Dt"],
        weight: Float[Tensor, " B"] | float = 1.0,
    ) -> None:
        """Add pairs; ``weight``: one of each pair, or one of all."""
        dtype = torch.float32 if max(image.shape[1], text.shape[1]) > WIDE else torch.float64
        x, y = image.to(dtype), text.to(dtype)
        weights = torch.as_tensor(weight, dtype=dtype, device=x.device).expand(len(x))
        # unweighted products are those of the features themselves, to the last bit
        wx, wy = (x, y) if bool((weights == 1).all()) else (weights[:, None] * x, weights[:, None] * y)
        self.weight += float(weights.double().sum())
        self.image += wx.double().sum(0)
        self.text += wy.double().sum(0)
        for total, left, right in ((self.image_image, wx, x), (self.image_text, wx, y), (self.text_text, wy, y)):
            total += left.T @ right

    def add_captions(
        self,
        image: Float[Tensor, "B Di"],
        counts: Int[Tensor, " B"],
        texts: Iterable[tuple[Int[Tensor, " k"], Float[Tensor, "k Dt"]]],
    ) -> None:
        """Add images with ``counts`` texts each, every text a pair of weight 1; ``texts`` in parts, with the rows of
        their images. Products of an image are computed once: the same sums as by ``add``, in another order, and bitwise
        those of ``add`` where each image has one text."""
        dtype = torch.float32 if max(image.shape[1], len(self.text)) > WIDE else torch.float64
        x = image.to(dtype)
        of_image = torch.zeros(len(x), len(self.text), dtype=dtype, device=x.device)
        for rows, text in texts:
            y = text.to(dtype)
            of_image.index_add_(0, rows.to(y.device), y)
            self.text += y.double().sum(0)
            self.text_text += y.T @ y
        wx = x if bool((counts == 1).all()) else counts.to(x)[:, None] * x
        self.weight += float(counts.sum())
        self.image += wx.double().sum(0)
        self.image_image += wx.T @ x
        self.image_text += x.T @ of_image

    def select(self, image: Int[Tensor, " di"], text: Int[Tensor, " dt"]) -> PairMoments:
        """The moments of some columns of either side."""
        return PairMoments(
            self.weight,
            self.image[image],
            self.text[text],
            self.image_image[image[:, None], image],
            self.image_text[image[:, None], text],
            self.text_text[text[:, None], text],
        )

    def centred(self) -> PairMoments:
        """The moments of the features less their weighted means."""
        n = self.weight
        return PairMoments(
            n,
            torch.zeros_like(self.image),
            torch.zeros_like(self.text),
            self.image_image - torch.outer(self.image, self.image / n),
            self.image_text - torch.outer(self.image, self.text / n),
            self.text_text - torch.outer(self.text, self.text / n),
        )


def combine_moments(sources: Sequence[tuple[PairMoments, float]]) -> PairMoments:
    """Several sources in one, each centred on its own mean: the mean of their covariances, weighted.

    A source counts by its weight whatever the number of its pairs. The result has total weight 1 and mean 0.
    """
    total = sum(weight for _, weight in sources)
    assert sources and total > 0, f"weights of sources: {[weight for _, weight in sources]}"
    first = sources[0][0]
    combined = PairMoments.empty(len(first.image), len(first.text), first.image.device)
    combined.weight = 1.0
    for moments, weight in sources:
        share, centred = weight / (total * moments.weight), moments.centred()
        combined.image_image.add_(centred.image_image, alpha=share)
        combined.image_text.add_(centred.image_text, alpha=share)
        combined.text_text.add_(centred.text_text, alpha=share)
    return combined
