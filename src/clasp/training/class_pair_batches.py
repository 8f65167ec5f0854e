"""Class pairs in gradient steps: a few beside the training pairs of each batch, at the input of the heads.

Input: the readers of cached pooled features, and class pairs in the same features (``ClassPairRows``). Output: batches
with class pairs after the training pairs. Note: which ones is drawn by a counter-based generator from the seed of a
batch's first sample, so that runs repeat and resume bitwise. Only pairs of single classes are drawn: a class and a
broader term, which cannot be each other's negatives, are then never in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.data.loader import BatchReader, philox_integers
from clasp.data.readers import PairIndex, SampleIndices
from clasp.models.standardize import Standardize
from clasp.training.class_pairs import ClassPairFeatures
from clasp.types import Batch, PooledFeatures


@dataclass(frozen=True)
class ClassPairRows:
    """Pairs of single classes as pooled features of both towers, and how often each is drawn."""

    image: Float[Tensor, "K Di"]
    """One of each class"""
    text: Float[Tensor, "n Dt"]
    concept: Int[np.ndarray, " n"]
    texts: tuple[str, ...]
    cumulative: Float[np.ndarray, " n"]
    """Weights of the pairs, summed up to 1"""
    per_sample: float
    """Class pairs for each training sample"""

    def draw(self, key: int, samples: int) -> Int[np.ndarray, " m"]:
        """The pairs for a batch of ``samples``, different ones, drawn by their weights."""
        uniform = philox_integers((key,), round(samples * self.per_sample)) / 2.0**63
        return np.unique(np.searchsorted(self.cumulative, uniform, side="right"))


def class_pair_rows(
    features: ClassPairFeatures,
    standardize: tuple[Standardize, Standardize],
    per_sample: float,
    mean_shrinkage: float | None = None,
) -> ClassPairRows:
    """The pairs of single classes as pooled features, before ``standardize``, that of the training pairs (image, text).

    As in the closed form, their texts are centred on the mean of the captions, and their images on the mean that the
    image head subtracts: with ``head.mean_shrinkage`` the shrunk one.
    """
    image, text = standardize
    pairs = features.classes.pairs
    single = np.flatnonzero([len(pairs.concepts[number].classes) == 1 for number in pairs.concept.tolist()])
    patterns = features.patterns(image)
    if mean_shrinkage is not None:
        patterns = patterns + image.shrunk_mean(mean_shrinkage)
    raw = image.invert(patterns[:, : image.pooled_width])
    weight = pairs.weight[single].to(features.text)
    own = features.text[single]
    mean = text.invert(torch.zeros(1, text.pooled_width, device=text.scale.device))
    centred = own - weight @ own / weight.sum() + mean.to(own)
    weights = np.cumsum(weight.double().cpu().numpy())
    return ClassPairRows(
        raw.cpu(),
        centred.cpu(),
        pairs.concept.numpy()[single],
        tuple(pairs.texts[number] for number in single),
        weights / weights[-1],
        per_sample,
    )


@dataclass(frozen=True, slots=True)
class ClassPairReader(BatchReader):
    """A ``BatchReader`` of cached pooled features that adds class pairs to each batch."""

    rows: ClassPairRows
    text_keys: Int[np.ndarray, " n"]

    @classmethod
    def around(cls, reader: BatchReader, rows: ClassPairRows) -> ClassPairReader:
        """The reader with class pairs; equal texts of captions and classes have equal keys."""
        assert isinstance(reader.pairs, PairIndex)
        keys, captions = reader.pairs.texts.find(rows.texts), len(reader.pairs.texts)
        others: dict[str, int] = {}
        for place in np.flatnonzero(keys < 0):
            keys[place] = captions + others.setdefault(rows.texts[place], len(others))
        return cls(reader.pairs, reader.image, reader.text, rows, keys)

    def __call__(self, indices: SampleIndices) -> Batch:
        batch = BatchReader.__call__(self, indices)
        assert isinstance(self.pairs, PairIndex)
        assert isinstance(batch.image, PooledFeatures) and isinstance(batch.text, PooledFeatures)
        drawn = self.rows.draw(int(indices.seed[0]), len(indices))
        skipped = {sample.id for sample in batch.skipped}
        kept = [place for place, id in enumerate(self.pairs.ids.take(indices.pair)) if id not in skipped]
        captions = self.pairs.text_indices(indices[kept])
        concepts = self.rows.concept[drawn]
        groups = np.concatenate((self.pairs.group[indices.pair[kept]], self.pairs.group.max() + 1 + concepts))
        texts = np.concatenate((captions, self.text_keys[drawn]))
        columns = [np.unique(column, return_inverse=True)[1] for column in (groups, texts)]
        return Batch(
            (*batch.ids, *(f"class {concept}" for concept in concepts.tolist())),
            PooledFeatures(torch.cat((batch.image.values, self.rows.image[concepts]))),
            PooledFeatures(torch.cat((batch.text.values, self.rows.text[drawn]))),
            torch.from_numpy(np.stack(columns, axis=1).astype(np.int64)),
            batch.skipped,
        )
