"""A task on embeddings that are given: pairs whose images are never read, and the folder of the embeddings.

Input: vectors of images by id and of texts. Output: the rows of the task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clasp.data.pairs import Pairs
from clasp.evaluation.embedding_folder import EmbeddingFolder, StoredEncoder
from clasp.evaluation.registry import find_task, parse_task_options
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.task_context import LoadedModel, TaskContext
from clasp.types import Caption, Pair, no_progress_bar


class Unread:
    """An image whose embedding is stored; each is another one."""

    version = "0"

    def __init__(self, name: str):
        self.name = name

    def read(self) -> bytes:
        raise AssertionError(f"{self.name} was read")


def pair(id: str, *captions: str, group: str = "", **meta: Any) -> Pair:
    return Pair(id, Unread(id), tuple(map(Caption, captions or ("x",))), group or id, meta)


def unit_vectors(count: int, seed: int, width: int) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def evaluate_embeddings(
    task: str,
    folder: Path,
    images: Mapping[str, Tensor],
    texts: Mapping[str, Tensor],
    pairs: Sequence[Pair],
    *options: str,
    fit: Sequence[Pair] = (),
) -> list[EvaluationResult]:
    """The rows of a task on ``pairs``, named ``zoo``; ``fit``: what every other name opens."""
    given = torch.stack([*images.values()])
    for name, table in (("image", images), ("text", texts or {"none": given[0]})):
        np.save(folder / f"{name}.npy", torch.stack([*table.values()]).numpy())
        (folder / f"{name}.json").write_text(json.dumps(list(table)))
    stored, entry = EmbeddingFolder(folder), find_task(task)
    context = TaskContext(
        name="stored",
        load=lambda: LoadedModel(StoredEncoder(stored, "stored"), stored),
        pairs=Pairs("zoo", [list(pairs)]),
        open_pairs=lambda source: Pairs(source, [list(fit)]),
        options=parse_task_options(task, entry, ["data=zoo", *options]),
        run=None,
        say=lambda line: None,
        bar=no_progress_bar,
    )
    return entry.run(context)
