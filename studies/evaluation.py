"""Evaluation of a cell: the metrics of a model, stored as the number of correctly answered queries of each group.

Input: a model, the ``FeatureSource`` of its inputs, pairs. Output: ``Answer``s, JSON that stores correctness query by
query, so that rows can later be compared on the same photos. Each tower runs once over an image or a text, for all
metrics. Groups are in a fixed order (sorted by id), which aligns the answers of all cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clasp.data.pairs import Pairs
from clasp.evaluation import probes
from clasp.evaluation.embedding_table import EmbeddingTable
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.zeroshot import ZeroShotQueries
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.models.tower import Tower
from clasp.plain_types import Precision
from clasp.types import ImageInput, PooledFeatures, TextInput

Answer = dict[str, Any]
"""``mean``, ``chance``, ``right`` (a hexadecimal digit per group: its correct queries), ``asked`` (queries per group:
one number, or such digits)"""


def answer(values: Float[Tensor, " q"], groups: Sequence[str], chance: float) -> Answer:
    """Queries scored 0 or 1 (ties in between) by groups of at most 15 queries."""
    right: dict[str, int] = dict.fromkeys(sorted(groups), 0)
    asked = dict(right)
    for value, group in zip(values.tolist(), groups, strict=True):
        right[group] += value >= 0.5
        asked[group] += 1
    sizes = set(asked.values())
    assert max(sizes) <= 15, "a group's count is one hexadecimal digit"
    digits = "".join(f"{count:x}" for count in asked.values())
    return {
        "mean": values.double().mean().item(),
        "chance": chance,
        "right": "".join(f"{count:x}" for count in right.values()),
        "asked": sizes.pop() if len(sizes) == 1 else digits,
    }


@dataclass(frozen=True)
class Seen:
    """Pooled features of a tower by id."""

    ids: tuple[str, ...]
    pooled: Float[Tensor, "n D"]

    def of(self, ids: Iterable[str]) -> Float[Tensor, "m D"]:
        row = {name: place for place, name in enumerate(self.ids)}
        return self.pooled[[row[name] for name in ids]]


def images_seen(model: DualEncoder, inputs: FeatureSource, pairs: Pairs, precision: Precision = "float32") -> Seen:
    """Image features of pairs, computed in this precision."""
    return _seen(model.image, inputs.images(pairs)(), precision)


def texts_seen(
    model: DualEncoder, inputs: FeatureSource, texts: Iterable[str], precision: Precision = "float32"
) -> Seen:
    """Text features of unique texts, computed in this precision; the text is the id."""
    return _seen(model.text, inputs.read(sorted(set(texts))), precision)


def _seen(tower: Tower, chunks: Iterable[tuple[Sequence[str], ImageInput | TextInput]], precision: Precision) -> Seen:
    ids: list[str] = []
    parts: list[Tensor] = []
    device = next(tower.parameters()).device.type
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        for names, inputs in chunks:
            ids.extend(names)
            parts.append((inputs.values if isinstance(inputs, PooledFeatures) else tower.pooled(inputs)).float().cpu())
    return Seen(tuple(ids), torch.cat(parts).clone())


def embedded(model: DualEncoder, seen: Seen) -> EmbeddingTable:
    """Image embeddings."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        return EmbeddingTable(seen.ids, model.embed_image(PooledFeatures(seen.pooled.to(device))).cpu())


def zero_shot(model: DualEncoder, seen: Seen, question: ZeroShotQueries) -> dict[str, Answer]:
    """Zero-shot ``top1`` and ``top5`` over images."""
    found = question.score(model, embedded(model, seen))[0]
    return {name: answer(found.means[name].values, found.groups, found.chance[name]) for name in ("top1", "top5")}


def log_likelihood(model: DualEncoder, seen: Seen, question: ZeroShotQueries) -> float:
    """Mean log-likelihood of the correct class, maximised over the temperature; more sensitive than accuracy, which
    only changes with the argmax."""
    images, classes = embedded(model, seen), question.class_embeddings(model)
    right = torch.tensor([list(question.classes).index(str(question.labels[name])) for name in images.ids])
    cosines = images.vectors @ classes.T
    return max(-F.cross_entropy(scale * cosines, right).item() for scale in (5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0))


def retrieval(
    model: DualEncoder, seen: Seen, question: RetrievalQueries, at: Sequence[int] = (1, 5)
) -> dict[str, Answer]:
    """``PART/recall@k`` over images or captions."""
    return {
        "/".join(filter(None, (found.direction, f"recall@{k}"))): answer(
            found.means[f"recall@{k}"].values, found.groups, found.chance[f"recall@{k}"]
        )
        for found in question.score(model, embedded(model, seen))
        for k in at
    }


def probed(fit: Seen, fit_labels: dict[str, int], asked: Seen, labels: dict[str, int]) -> dict[str, Answer]:
    """``knn`` and ``linear`` probe accuracy on the pooled features of an image tower."""
    known, wanted = (torch.tensor([of[name] for name in seen.ids]) for seen, of in ((fit, fit_labels), (asked, labels)))
    chance = probes.commonest_class_share(wanted)
    found = {
        "knn": probes.knn_probe(fit.pooled, known, asked.pooled, wanted),
        "linear": probes.linear_probe(fit.pooled, known, torch.arange(len(known)), asked.pooled, wanted),
    }
    return {name: answer(answers.right, asked.ids, chance) for name, answers in found.items()}


def sentences(seen: Seen, photo: dict[str, str]) -> Answer:
    """Whether the nearest other caption, by cosine of pooled text features, belongs to the same photo."""
    vectors = F.normalize(seen.pooled, dim=1)
    cosines = vectors @ vectors.T
    cosines.fill_diagonal_(-2)
    numbers: Int[Tensor, " n"] = _numbers([photo[text] for text in seen.ids])
    right = (numbers[cosines.argmax(dim=1)] == numbers).double()
    others = sum((numbers == number).sum().item() - 1 for number in numbers.tolist()) / len(numbers)
    return answer(right, [photo[text] for text in seen.ids], others / (len(numbers) - 1))


def _numbers(names: Sequence[str]) -> Int[Tensor, " n"]:
    first = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([first[name] for name in names])
