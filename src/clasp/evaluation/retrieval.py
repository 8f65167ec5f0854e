"""Retrieval: the captions of an image among all captions, and the images of a caption among all images.

Input: an encoder, embedded images, a stream of captions, and the group of each image and caption. Output: a
``QueryScores`` per direction, with a value for every query. Note: positives are defined by group, never by position;
what can be checked without reading a stream is checked when the queries are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from clasp.evaluation import metrics
from clasp.evaluation.embedding_table import EmbeddingTable, TextBatches, embed_batches
from clasp.evaluation.name_checks import quote_first, require_known
from clasp.evaluation.query_scores import MeanMetric, QueryScores
from clasp.types import Encoder, UserError

RetrievalDirection = Literal["image_to_text", "text_to_image"]

_RECALL_KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class RetrievalQueries:
    """Retrieval: an image and a caption are positives of each other when their groups are equal.

    Recall@k counts a query as correct when any positive is among the first k, as in CLIP papers (5 captions per image).
    An image whose group has no caption here (or the reverse) stays in the gallery but is no query.

    Attributes:
        image_groups: id to group of the images to search among; others are left out.
        text_groups: caption id to group.
        texts: the captions as inputs of the text tower, with their ids.
        directions: the directions to evaluate.

    Raises:
        UserError: no group has both an image and a caption; an unknown direction. When scored: a caption without group.
    """

    image_groups: Mapping[str, str]
    text_groups: Mapping[str, str]
    texts: TextBatches
    directions: tuple[RetrievalDirection, ...] = ("image_to_text", "text_to_image")
    metric_names: tuple[str, ...] = field(
        default=(*(f"recall@{k}" for k in _RECALL_KS), "mean_recall", "median_rank"), init=False
    )

    def __post_init__(self) -> None:
        _check_directions(self.directions)
        _require_overlap(self.image_groups.values(), self.text_groups.values())

    def score(self, encoder: Encoder, images: EmbeddingTable) -> list[QueryScores]:
        """Recall at 1, 5 and 10, their mean, and the median rank of the first positive; in each direction."""
        texts = embed_batches(self.texts(), encoder.embed_text, "caption")
        images = images.select(self.image_groups)
        require_known(texts.ids, self.text_groups, "caption", "group")
        image_groups = [self.image_groups[id] for id in images.ids]
        text_groups = [self.text_groups[id] for id in texts.ids]
        _require_overlap(image_groups, text_groups)
        sides = {
            "image_to_text": (images, image_groups, texts, text_groups),
            "text_to_image": (texts, text_groups, images, image_groups),
        }
        return [self._score_direction(part, *sides[part]) for part in self.directions]

    def _score_direction(
        self,
        part: RetrievalDirection,
        queries: EmbeddingTable,
        query_groups: Sequence[str],
        gallery: EmbeddingTable,
        gallery_groups: Sequence[str],
    ) -> QueryScores:
        number = {group: index for index, group in enumerate(dict.fromkeys(gallery_groups))}
        query_rows = [row for row, group in enumerate(query_groups) if group in number]
        groups = tuple(query_groups[row] for row in query_rows)
        labels = torch.tensor([number[group] for group in groups])
        candidates = torch.tensor([number[group] for group in gallery_groups])
        asked = queries.vectors[query_rows]
        counts = metrics.rank_counts(asked, gallery.vectors, labels, candidates)
        chance_counts = metrics.chance_rank_counts(labels, candidates)
        chance = {name: mean.value() for name, mean in _recall_metrics(chance_counts).items()}
        return QueryScores(
            direction=part,
            ids=tuple(queries.ids[row] for row in query_rows),
            groups=groups,
            means=_recall_metrics(counts),
            medians={"median_rank": metrics.median_rank(counts)},
            chance=chance | {"median_rank": metrics.median_rank(chance_counts)},
            expected=groups,
            ranks=metrics.expected_ranks(counts),
            predict=lambda: [gallery.ids[row] for row in metrics.first_ranked(asked, gallery.vectors)],
        )


def _recall_metrics(counts: metrics.RankCounts) -> dict[str, MeanMetric]:
    found = {f"recall@{k}": metrics.hit_at_k(counts, k) for k in _RECALL_KS}
    found["mean_recall"] = torch.stack(list(found.values())).mean(dim=0)
    return {name: MeanMetric(values) for name, values in found.items()}


def _check_directions(parts: Sequence[str]) -> None:
    known = ("image_to_text", "text_to_image")
    if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(known):
        raise UserError(f"retrieval directions {list(parts)}: give one or both of {', '.join(known)}")


def _require_overlap(image_groups: Iterable[str], text_groups: Iterable[str]) -> None:
    images, texts = set(image_groups), set(text_groups)
    if not images & texts:
        raise UserError(
            f"no image has a caption: no group is common to images ({quote_first(sorted(images)) or 'none'}) "
            f"and captions ({quote_first(sorted(texts)) or 'none'})"
        )
