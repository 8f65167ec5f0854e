"""Pairs with classes for the quality benchmark: copied to a working folder, a tenth of each class held out.

Input: training pairs and test photos as ``clasp train`` opens them (folders, tables, tars), whose meta has the class.
Output: ``train.jsonl``, ``val.jsonl`` and ``test.jsonl`` with their images; and zero-shot tasks over them for any
encoder. Note: the caption of a held-out photo is its class in the prompt template, so that ``clasp train`` validates by
zero-shot classification over the same prompts as the peer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.config.build import ModelAndPreprocessing
from clasp.data.pairs import Pairs, open_pairs
from clasp.evaluation.tasks import ZeroShotTask
from clasp.evaluation.zeroshot import ZeroShotQueries
from clasp.types import Pair, Pixels, UserError

HELD_OUT = 0.1
IMAGES_A_CALL = 256


def write_splits(pairs: Pairs, test: Pairs, folder: Path, *, label: str, template: str) -> dict[str, int]:
    """Write the three splits; returns their sizes. Raises ``UserError`` for a photo without a class."""
    by_class: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_class[_class_of(pair, label)].append(pair)
    lonely = sorted(name for name, members in by_class.items() if len(members) < 2)
    if lonely:
        raise UserError(f"--pairs: the class {lonely[0]!r} has one photo; two are needed, one to hold out")
    train, val = list[Pair](), list[Pair]()
    for members in by_class.values():
        held_out = max(1, round(HELD_OUT * len(members)))
        val += members[:held_out]
        train += members[held_out:]
    unknown = sorted({_class_of(pair, label) for pair in test} - by_class.keys())
    if unknown:
        raise UserError(f"--test: the class {unknown[0]!r} has no photo in --pairs; leave its photos out")
    order = {pair.id: number for number, pair in enumerate(pairs)}
    train.sort(key=lambda pair: order[pair.id])
    named = {"train": train, "val": val, "test": list(test)}
    for split, members in named.items():
        (folder / split).mkdir(parents=True)
        rows = [_write_row(pair, number, folder / split, split, label, template) for number, pair in enumerate(members)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {split: len(members) for split, members in named.items()}


def _class_of(pair: Pair, label: str) -> str:
    if label not in pair.meta:
        raise UserError(f"the pair {pair.id!r} has no {label!r}; it has {', '.join(pair.meta) or 'nothing'}: --label")
    return str(pair.meta[label])


def _write_row(pair: Pair, number: int, folder: Path, split: str, label: str, template: str) -> dict[str, object]:
    (folder / f"{number}.img").write_bytes(pair.image.read())
    row: dict[str, object] = {"id": f"{split}-{number}", "image": f"{split}/{number}.img"}
    if split == "train":
        return {**row, "caption": [caption.text for caption in pair.captions], "group": pair.group}
    prompt = template.replace("{}", _class_of(pair, label))
    return {**row, "caption": prompt, "class": prompt}


def open_split(folder: Path, split: str) -> Pairs:
    """A split that ``write_splits`` wrote."""
    return open_pairs(folder / f"{split}.jsonl")


def decode(pairs: Sequence[Pair], parts: ModelAndPreprocessing) -> Float[Tensor, "n 3 size size"]:
    """Normalised pixels, by clasp's transform."""
    return torch.stack([parts.transform(pair.image.read()) for pair in pairs])


def zero_shot(pairs: Pairs, parts: ModelAndPreprocessing, *, data: str) -> ZeroShotTask:
    """Zero-shot classification of held-out photos over their prompts; the photos are decoded once."""
    members, pixels = list(pairs), decode(list(pairs), parts)
    labels = {pair.id: str(pair.meta["class"]) for pair in members}
    starts = range(0, len(members), IMAGES_A_CALL)
    chunks = [
        ([pair.id for pair in members[start : start + IMAGES_A_CALL]], Pixels(pixels[start : start + IMAGES_A_CALL]))
        for start in starts
    ]
    queries = ZeroShotQueries(
        labels=labels,
        classes=sorted(set(labels.values())),
        templates=["{}"],
        read=lambda texts: [(texts, parts.tokenizer(texts))],
    )
    return ZeroShotTask(data=data, images=lambda: chunks, queries=queries)
