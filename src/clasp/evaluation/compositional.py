"""Compositional tests: does an image match its own caption better than one made of almost the same words?

Input: an encoder, embedded images, captions. Output: a ``QueryScores``. ``HardNegativeQueries`` is the scoring of
SugarCrepe (and of ARO and VL-CheckList), ``WinogroundQueries`` that of Winoground. Note: tied scores are broken at
random in the first, so that collapsed embeddings score at chance, and are wrong in the second, as in its paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.data.formats.rows import is_blank
from clasp.evaluation import metrics
from clasp.evaluation.embedding_table import EmbeddingTable, TextBatcher, embed_batches
from clasp.evaluation.name_checks import require_known
from clasp.evaluation.query_scores import MeanMetric, QueryScores
from clasp.types import Encoder, UserError


@dataclass(frozen=True, kw_only=True)
class HardNegativeQueries:
    """Whether an image is nearer to its caption than to each hard negative (SugarCrepe: Hsieh et al., NeurIPS 2023).

    SugarCrepe counts a tie as wrong; ours as the probability of the right order.

    Attributes:
        candidates: image id to texts, the right one first.
        groups: image id to cluster, for intervals.
        read: makes text-tower inputs of texts.

    Raises:
        UserError: an image without a negative, with one that is its caption, or with an empty text.
    """

    candidates: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, str]
    read: TextBatcher
    directions: tuple[str, ...] = field(default=("",), init=False)
    metric_names: tuple[str, ...] = field(default=("accuracy",), init=False)

    def __post_init__(self) -> None:
        for image, (right, *negatives) in self.candidates.items():
            if not negatives:
                raise UserError(f"image {image!r} has no negative caption")
            if any(map(is_blank, (right, *negatives))):
                raise UserError(f"image {image!r}: one of its captions is empty: {[right, *negatives]}")
            if right in negatives:
                raise UserError(f"image {image!r}: its caption is among its negatives: {right!r}")

    def score(self, encoder: Encoder, images: EmbeddingTable) -> list[QueryScores]:
        """Accuracy: the mean over images."""
        require_known(images.ids, self.candidates, "image", "caption")
        chosen = [self.candidates[id] for id in images.ids]
        texts = _embed_texts(self.read, encoder, [text for each in chosen for text in each])
        scores = [vector @ texts.rows(each).T for vector, each in zip(images.vectors, chosen, strict=True)]
        gaps = [each[1:] - each[0] for each in scores]
        better = torch.tensor([int((gap > metrics.TIE_TOLERANCE).sum()) for gap in gaps])
        tied = torch.tensor([int((gap.abs() <= metrics.TIE_TOLERANCE).sum()) for gap in gaps])
        right = metrics.hit_at_k(metrics.RankCounts(better, tied, torch.ones_like(better)), 1)
        chance = torch.tensor([1 / len(each) for each in chosen]).double().mean().item()
        scored = QueryScores(
            direction="",
            ids=images.ids,
            groups=tuple(self.groups[id] for id in images.ids),
            means={"accuracy": MeanMetric(right)},
            medians={},
            chance={"accuracy": chance},
            expected=tuple(each[0] for each in chosen),
            predict=lambda: [each[int(of.argmax())] for each, of in zip(chosen, scores, strict=True)],
        )
        return [scored]


@dataclass(frozen=True, kw_only=True)
class WinogroundQueries:
    """Two images and two captions of the same words, to be matched (Thrush et al., CVPR 2022, equations 1 to 3).

    ``text_score``: each image is nearer to its own caption; ``image_score``: each caption is nearer to its own image;
    ``group_score``: both. Chance: 1/4, 1/4 and 1/6, the last for four scores in random order.

    Attributes:
        examples: name to two pairs of image id and caption. One of which an image could not be read is left out.
        read: makes text-tower inputs of texts.
    """

    examples: Mapping[str, tuple[tuple[str, str], tuple[str, str]]]
    read: TextBatcher
    directions: tuple[str, ...] = field(default=("",), init=False)
    metric_names: tuple[str, ...] = field(default=("group_score", "text_score", "image_score"), init=False)

    def score(self, encoder: Encoder, images: EmbeddingTable) -> list[QueryScores]:
        """The three scores: means over examples."""
        row = {id: place for place, id in enumerate(images.ids)}
        names = [name for name, pairs in self.examples.items() if all(image in row for image, _ in pairs)]
        if not names:
            raise UserError("no example has both of its images")
        captions = [[text for _, text in self.examples[name]] for name in names]
        texts = _embed_texts(self.read, encoder, [text for each in captions for text in each])
        of_texts = torch.stack([texts.rows(each) for each in captions])
        of_images = images.vectors[torch.tensor([[row[image] for image, _ in self.examples[name]] for name in names])]
        cosine = torch.einsum("nie,nte->nit", of_images, of_texts)  # example, image, text
        own = cosine.diagonal(dim1=1, dim2=2)
        text_right = (own - cosine.flip(2).diagonal(dim1=1, dim2=2) > metrics.TIE_TOLERANCE).all(dim=1)
        image_right = (own - cosine.flip(1).diagonal(dim1=1, dim2=2) > metrics.TIE_TOLERANCE).all(dim=1)
        values = (text_right & image_right, text_right, image_right)
        scored = QueryScores(
            direction="",
            ids=tuple(names),
            groups=tuple(names),
            means={name: MeanMetric(value.double()) for name, value in zip(self.metric_names, values, strict=True)},
            medians={},
            chance=dict(zip(self.metric_names, (1 / 6, 1 / 4, 1 / 4), strict=True)),
            expected=tuple(" | ".join(each) for each in captions),
        )
        return [scored]


@dataclass(frozen=True, slots=True)
class _TextTable:
    """Embeddings of texts, by text."""

    row: Mapping[str, int]
    vectors: Float[Tensor, "n E"]

    def rows(self, texts: tuple[str, ...] | list[str]) -> Float[Tensor, "k E"]:
        return self.vectors[[self.row[text] for text in texts]]


def _embed_texts(read: TextBatcher, encoder: Encoder, texts: list[str]) -> _TextTable:
    table = embed_batches(read(list(dict.fromkeys(texts))), encoder.embed_text, "caption")
    return _TextTable({text: row for row, text in enumerate(table.ids)}, table.vectors)
