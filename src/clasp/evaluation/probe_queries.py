"""Images with a class, classified by a probe on the image embeddings of a fit set.

Input: an encoder, embedded images, a stream of images to fit on, and a probe of ``clasp.evaluation.probes``. Output:
one ``QueryScores``. Note: features are the joint embeddings, as in CLIP_benchmark; CLIP's own linear probes read the
features before the projection, and so does ``clasp eval RUN retention``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.evaluation import probes
from clasp.evaluation.embedding_table import EmbeddingTable, ImageBatches, embed_batches
from clasp.evaluation.name_checks import require_known
from clasp.evaluation.probes import ProbeAnswers
from clasp.evaluation.query_scores import MeanMetric, QueryScores
from clasp.types import Encoder


@dataclass(frozen=True, slots=True)
class FitSet:
    """Embeddings to fit on, their classes and groups, and their ids."""

    ids: tuple[str, ...]
    features: Float[Tensor, "n E"]
    labels: Int[Tensor, " n"]
    groups: Int[Tensor, " n"]

    def subset(self, rows: Sequence[int]) -> FitSet:
        """Some of the rows."""
        chosen = torch.tensor(rows)
        ids = tuple(self.ids[row] for row in rows)
        return FitSet(ids, self.features[chosen], self.labels[chosen], self.groups[chosen])


Probe = Callable[[FitSet, Float[Tensor, "q E"], Int[Tensor, " q"]], ProbeAnswers]
"""The answers to queries, given the fit set, their embeddings and their classes"""


@dataclass(frozen=True, kw_only=True)
class ProbeQueries:
    """Top-1 accuracy of a probe, and its mean per class.

    Attributes:
        labels, groups: image id to class and to cluster, of the queries.
        fit_labels, fit_groups: the same of the images to fit on; their ids may be those of other images among queries.
        classes: the classes; a label is one of them.
        fit: the images to fit on; ``None``: they are among the embedded images, and those with a label are the queries.
        probe: the classifier.
    """

    labels: Mapping[str, str]
    groups: Mapping[str, str]
    fit_labels: Mapping[str, str]
    fit_groups: Mapping[str, str]
    classes: Sequence[str]
    fit: ImageBatches | None
    probe: Probe
    directions: tuple[str, ...] = field(default=("",), init=False)
    metric_names: tuple[str, ...] = field(default=("top1", "mean_per_class"), init=False)

    def score(self, encoder: Encoder, images: EmbeddingTable) -> list[QueryScores]:
        """Whether each image's class is predicted."""
        asked, known = images, images
        if self.fit is None:
            asked, known = images.select(self.labels), images.select(self.fit_labels)
        else:
            require_known(images.ids, self.labels, "image", "label")
            known = embed_batches(self.fit(), encoder.embed_image, "image to fit on")
        number = {name: place for place, name in enumerate(self.classes)}
        fit_labels = torch.tensor([number[self.fit_labels[id]] for id in known.ids])
        labels = torch.tensor([number[self.labels[id]] for id in asked.ids])
        group = {name: place for place, name in enumerate(sorted({self.fit_groups[id] for id in known.ids}))}
        groups = torch.tensor([group[self.fit_groups[id]] for id in known.ids])
        answers = self.probe(FitSet(known.ids, known.vectors, fit_labels, groups), asked.vectors, labels)
        scored = QueryScores(
            direction="",
            ids=asked.ids,
            groups=tuple(self.groups[id] for id in asked.ids),
            means={"top1": MeanMetric(answers.right), "mean_per_class": MeanMetric(answers.right, cells=labels)},
            medians={},
            chance={"top1": probes.commonest_class_share(labels), "mean_per_class": 1 / len(labels.unique())},
            expected=tuple(self.labels[id] for id in asked.ids),
            predict=lambda: [self.classes[int(place)] for place in answers.predicted],
        )
        return [scored]


def knn_of(k: int, temperature: float) -> Probe:
    """``probes.knn_probe`` with these settings."""
    return lambda fit, queries, labels: probes.knn_probe(
        fit.features, fit.labels, queries, labels, k=k, temperature=temperature
    )


def linear_of(shots: int | None, draws: int) -> Probe:
    """``probes.linear_probe``; with ``shots``, fitted to so many images of each class: whether it is right is the mean
    over ``draws``, and the class that most draws predict, of tied ones the first, is the predicted one."""

    def fit_and_predict(fit: FitSet, queries: Float[Tensor, "q E"], labels: Int[Tensor, " q"]) -> ProbeAnswers:
        chosen = [fit] if shots is None else [fit.subset(draw_shots(fit, shots, draw)) for draw in range(draws)]
        each = [probes.linear_probe(some.features, some.labels, some.groups, queries, labels) for some in chosen]
        right, predicted = (torch.stack(columns) for columns in zip(*each, strict=True))
        return ProbeAnswers(right.mean(dim=0), predicted.mode(dim=0).values)

    return fit_and_predict


def draw_shots(fit: FitSet, shots: int, draw: int) -> list[int]:
    """``shots`` rows of each class, those with the lowest hash of draw and id, whatever the order of reading was."""
    order = sorted(
        range(len(fit.ids)),
        key=lambda row: hashlib.sha256(f"{draw}\0{fit.ids[row]}".encode("utf-8", "surrogatepass")).digest(),
    )
    chosen: dict[int, list[int]] = {}
    for row in order:
        of_class = chosen.setdefault(int(fit.labels[row]), [])
        if len(of_class) < shots:
            of_class.append(row)
    return sorted(row for rows in chosen.values() for row in rows)
