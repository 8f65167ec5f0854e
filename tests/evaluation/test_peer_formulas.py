"""Our tasks beside the formulas of CLIP_benchmark, written out plainly, on the same embeddings: equal to 1e-6.

Formulas of https://github.com/LAION-AI/CLIP_benchmark, ``clip_benchmark/metrics`` (MIT), restated: top-k of the whole
score matrix, one caption at least among the first k, balanced accuracy, precision averaged over positives, the caption
before its negatives. Equal scores, which it breaks by position, do not occur here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toyembeddings import evaluate_embeddings, pair, unit_vectors

WIDTH, IMAGES, CLASSES, CAPTIONS = 16, 120, 9, 5
TEMPLATES = ("a photo of a {}.", "{} in the wild")


def unit(count: int, seed: int) -> Tensor:
    return unit_vectors(count, seed, WIDTH)


def numbered(images: Tensor) -> dict[str, Tensor]:
    """By the ids of the pairs."""
    return {f"i{number}": vector for number, vector in enumerate(images)}


def near(vectors: Tensor, seed: int, noise: float = 1.0) -> Tensor:
    return F.normalize(vectors + noise * unit(len(vectors), seed), dim=1)


def test_zero_shot_classification(tmp_path: Path):
    centres, names = unit(CLASSES, 0), [f"c{number}" for number in range(CLASSES)]
    labels = torch.arange(IMAGES) ** 2 % CLASSES  # classes of different sizes, some of none
    images = near(centres[labels], 1, 1.5)
    prompts = {(t, n): vector for t in TEMPLATES for n, vector in zip(names, near(centres, len(t)), strict=True)}
    weights = torch.stack([torch.stack([prompts[t, n] for t in TEMPLATES]).mean(dim=0) for n in names])
    logits = 100 * images @ F.normalize(weights, dim=1).T
    top = logits.topk(5, dim=1).indices
    (tmp_path / "classes.txt").write_text("\n".join(names))
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    options = (f"classes={tmp_path / 'classes.txt'}", f"templates={tmp_path / 'templates.txt'}")
    pairs = [pair(f"i{n}", names[int(label)], **{"class": names[int(label)]}) for n, label in enumerate(labels)]
    texts = {template.format(name): vector for (template, name), vector in prompts.items()}
    (row,) = evaluate_embeddings("zeroshot", tmp_path, numbered(images), texts, pairs, *options)
    by_class = [(top[labels == c, 0] == c).float().mean().item() for c in labels.unique()]  # balanced accuracy
    expected = {
        "top1": (top[:, 0] == labels).float().mean().item(),
        "top5": (top == labels[:, None]).any(dim=1).float().mean().item(),
        "mean_per_class": sum(by_class) / len(by_class),
    }
    assert 0.2 < expected["top1"] < 0.95
    assert {name: row.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_retrieval_with_several_captions(tmp_path: Path):
    images = unit(IMAGES, 2)
    owner = torch.arange(IMAGES).repeat_interleave(CAPTIONS)
    texts = near(images[owner], 3, 2.0)
    scores, positive = texts @ images.T, owner[:, None] == torch.arange(IMAGES)
    captions = [f"caption {number}" for number in range(len(texts))]
    pairs = [pair(f"i{n}", *captions[CAPTIONS * n : CAPTIONS * (n + 1)]) for n in range(IMAGES)]
    found = evaluate_embeddings("retrieval", tmp_path, numbered(images), dict(zip(captions, texts, strict=True)), pairs)
    rows = {row.task.rpartition("/")[2]: row.metrics for row in found}
    for k in (1, 5, 10):
        for direction, of, right in (
            ("text_to_image", scores, positive),
            ("image_to_text", scores.T, positive.T),
        ):
            expected = right.gather(1, of.topk(k, dim=1).indices).any(dim=1).float().mean().item()
            assert 0.1 < expected < 1
            assert rows[direction][f"recall@{k}"] == pytest.approx(expected, abs=1e-6)


def test_average_precision_of_several_classes(tmp_path: Path):
    generator, names = torch.Generator().manual_seed(4), [f"c{number}" for number in range(CLASSES)]
    truth = torch.rand(IMAGES, CLASSES, generator=generator) < 0.3
    classes = unit(CLASSES, 5)
    images = near(F.normalize(truth.float() @ classes + 1e-3, dim=1), 6)
    scores = images @ classes.T
    precisions = []
    for of_class, right in zip(scores.T, truth.T, strict=True):
        ordered = right[of_class.argsort(descending=True)].float()
        precisions.append(((ordered.cumsum(0) / torch.arange(1, IMAGES + 1)) * ordered).sum() / ordered.sum())
    pairs = [pair(f"i{n}", "x", classes=[names[c] for c in row.nonzero()[:, 0]]) for n, row in enumerate(truth)]
    texts = dict(zip(names, classes, strict=True))
    (row,) = evaluate_embeddings("multilabel", tmp_path, numbered(images), texts, pairs, "templates={}")
    assert row.metrics["mean_average_precision"] == pytest.approx(torch.stack(precisions).mean().item(), abs=1e-6)


def test_caption_before_its_negatives(tmp_path: Path):
    images = unit(IMAGES, 7)
    right, wrong = near(images, 8, 3.0), near(images, 9, 3.0)
    texts = {f"{kind} {n}": v for kind, of in (("right", right), ("wrong", wrong)) for n, v in enumerate(of)}
    pairs = [pair(f"i{n}", f"right {n}", negative_caption=f"wrong {n}") for n in range(IMAGES)]
    (row,) = evaluate_embeddings("sugarcrepe", tmp_path, numbered(images), texts, pairs)
    scores = torch.stack([(images * side).sum(dim=1) for side in (right, wrong)], dim=1)
    expected = (scores.argmax(dim=1) == 0).float().mean().item()
    assert 0.2 < expected < 0.8
    (metric,) = row.metrics
    assert row.metrics[metric] == pytest.approx(expected, abs=1e-6)
