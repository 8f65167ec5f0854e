"""The common workload of all contestants: two towers with real weights, and real images and captions.

The towers come inside pip packages: a DINOv2 ViT-S/14 at 98 px (50 tokens) and all-MiniLM-L6. The pairs are those of
the demo's sample: one drawing of each concept, its English name and keywords (captions of 4 to 40 tokens). Output:
clasp's own parts (``Ours``: batches, model and step, as in ``clasp train``) and the same pairs as plain tensors for the
peers, which therefore need not decode anything.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.config.build import ModelAndPreprocessing, build_model_and_preprocessing
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.data.loader import PairLoader
from clasp.data.pairs import Pairs, open_pairs
from clasp.data.readers import PairIndex
from clasp.data.samples.emoji import unpack_emoji_sample
from clasp.models.cache_policy import CachePolicy
from clasp.models.feature_settings import FeatureSettings
from clasp.models.features import FeatureSource
from clasp.models.precision import PrecisionChoice
from clasp.plain_types import Precision
from clasp.training.attention_kernel import choose_attention_kernel, use_attention_kernel
from clasp.training.distributed import Processes
from clasp.training.losses import build_loss
from clasp.training.memory import ActivationMemory
from clasp.training.settings import TrainSettings
from clasp.training.step import Stepper
from clasp.types import Batch

SIZE = 98
WIDTH = 256  # of the joint space

WORK = Path(tempfile.gettempdir()) / "clasp-benchmarks"  # unpacked once and shared between the scripts


def recipe(*changes: str) -> Recipe:
    """The two towers and linear heads; ``changes`` such as ``tune.text=["full"]``."""
    towers = {
        "image": {"tower": "pip:dinov2-small-focus", "size": SIZE},
        "text": {"tower": "pip:minilm-l6"},
        "head": {"kind": "linear", "width": WIDTH},
    }
    return recipe_from_dict(towers, "the benchmarks").with_overrides(changes)


def parts(recipe: Recipe) -> ModelAndPreprocessing:
    """The model of a recipe with its transform and tokenizer."""
    return build_model_and_preprocessing(recipe)


@cache
def untouched() -> ModelAndPreprocessing:
    """The two base towers, for peers to copy. Clear this cache before ``harness.peak_of``."""
    return parts(recipe())


@cache
def _rows() -> list[dict[str, str]]:
    sample = unpack_emoji_sample(WORK, quick=True)
    rows = []
    for line in sample.pairs("train").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        english = [caption["text"] for caption in row["caption"] if caption["language"] == "en"]
        rows.append({"id": row["id"], "image": str(sample.folder / row["image"]), "caption": english[-1]})
    return rows


def pairs(count: int) -> Pairs:
    """The first ``count`` pairs (at most 1,114), opened by clasp."""
    path = WORK / f"pairs-{count}.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in _rows()[:count])
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # a file that changes is not read on
        path.write_text(text, encoding="utf-8")
    return open_pairs(path, image_root=WORK)


def captions(count: int) -> list[str]:
    """Captions with keywords; beyond the 1,114 available, with a number appended, so that all are unique."""
    texts = [row["caption"] for row in _rows()]
    return [texts[n % len(texts)] + (f" {n // len(texts)}" if n >= len(texts) else "") for n in range(count)]


@dataclass(frozen=True)
class Plain:
    """Pairs in memory, library-independent: normalised pixels, and captions as lists of token ids."""

    pixels: Float[Tensor, "n 3 98 98"]
    ids: list[list[int]]

    def tokens(
        self, rows: Sequence[int], length: int | None = None
    ) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
        """Ids and mask of some captions, padded to the longest of them or to a fixed length."""
        captions = [self.ids[row] for row in rows]
        longest = length or max(map(len, captions))
        ids, mask = torch.zeros(2, len(captions), longest, dtype=torch.long)
        for row, caption in enumerate(captions):
            caption = caption[:longest]
            ids[row, : len(caption)] = torch.tensor(caption)
            mask[row, : len(caption)] = 1
        return ids, mask


def plain(assembled: ModelAndPreprocessing, count: int) -> Plain:
    """The first ``count`` pairs, preprocessed by clasp's transform and tokenizer outside the peers' timing."""
    chosen = _rows()[:count]
    pixels = torch.stack([assembled.transform(Path(row["image"]).read_bytes()) for row in chosen])
    return Plain(pixels, assembled.tokenizer.encode([row["caption"] for row in chosen]))


class Ours:
    """clasp as in ``clasp train``, without logging and evaluation.

    ``cache`` is the folder of the feature cache. The optimizer state is kept over epochs, with the schedule of a long
    run.
    """

    def __init__(self, recipe: Recipe, pairs: Pairs, *, batch: int, cache: Path, precision: Precision = "float32"):
        self.recipe, self.pairs, self.batch, self.cache = recipe, pairs, batch, cache
        self.parts = parts(recipe)
        self.model = self.parts.model
        self.settings = TrainSettings(batch_size=batch, micro_batch=batch, epochs=1, precision=precision)
        self.index = PairIndex(pairs)
        self.stepper = Stepper(
            self.model,
            build_loss(recipe.loss),
            self.settings,
            Processes(device=torch.device("cpu")),
            precision,
            steps=100_000,
            kinds={},
        )
        self.kernel = choose_attention_kernel("auto", precision, torch.device("cpu")).attention
        self.steps = self.epochs = 0
        self.model.train()

    def read(self) -> PairLoader:
        """The batches of the run; features of frozen parts are computed here if they are not cached."""
        inputs = FeatureSource(
            self.model.image,
            self.model.text,
            transform=self.parts.transform,
            tokenizer=self.parts.tokenizer,
            settings=FeatureSettings(
                CachePolicy(self.cache, self.recipe.data.feature_cache),
                precision=PrecisionChoice(self.stepper.precision, "of the benchmark"),
            ),
        )
        return PairLoader(inputs.batch_reader(self.pairs, self.index, None), batch_size=self.batch, seed=0)

    @cached_property
    def batches(self) -> PairLoader:
        return self.read()

    def step(self, batch: Batch) -> int:
        """One step; returns its pairs."""
        with use_attention_kernel(self.kernel):
            return self._step(batch)

    def _step(self, batch: Batch) -> int:
        self.stepper.step(batch, self.steps)
        self.steps += 1
        return len(batch.ids)

    def epoch(self, batches: PairLoader | None = None, most: int | None = None) -> int:
        """An epoch, or its first ``most`` steps; returns the number of pairs."""
        self.epochs += 1
        seen = 0
        with use_attention_kernel(self.kernel):  # once, as in a run
            for number, batch in enumerate((batches or self.batches).epoch(self.epochs)):
                if number == most:
                    break
                seen += self._step(batch)
        return seen

    def kept(self, batch: Batch) -> int:
        """Activation memory of a step, bytes."""
        with ActivationMemory(self.model.parameters()) as kept:
            out = self.model(batch)
            self.stepper.loss(out.image, out.text, out.scale, out.bias, groups=batch.groups)
        return kept.bytes
