"""Scoring retrieval of 5,000 images and 25,000 captions (the test set of COCO), E = 512: time and memory.

clasp's is what ``clasp eval RUN retrieval`` does with embeddings: both directions, all metrics, 95 % intervals. The
peer is CLIP_benchmark's way (``metrics/zeroshot_retrieval.py``), restated: the whole score matrix and that of the
positives, and of each k the one-hot vectors of the first k, 64 queries at a time; no median rank and no intervals. Each
peak is measured in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Contestant, Measured, Peak, Row, sized
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.tasks import RetrievalTask
from clasp.types import ImageInput, PooledFeatures, TextInput

IMAGES, CAPTIONS_EACH, WIDTH, BATCH = sized(5000, 40), 5, 512, 64
TARGET_SECONDS, TARGET_MEGABYTES = 2.5, 1000.0
SLOWER, LARGER = 0.21, 0.2  # those by 12.1 s and 5.2 GB, which CLIP_benchmark itself took


class Given:
    """An encoder whose inputs are its embeddings."""

    name, fingerprint = "given", "given"

    def encode_image(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def embed_image(self, inputs: ImageInput) -> Tensor:
        assert isinstance(inputs, PooledFeatures)
        return inputs.values

    def embed_text(self, inputs: TextInput) -> Tensor:
        assert isinstance(inputs, PooledFeatures)
        return inputs.values


def embeddings() -> tuple[Tensor, Tensor]:
    """Unit vectors of images, and of their captions in turn: near them, so that recall is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(IMAGES, WIDTH, generator=generator), dim=1)
    noise = 3 * F.normalize(torch.randn(IMAGES * CAPTIONS_EACH, WIDTH, generator=generator), dim=1)
    return images, F.normalize(images.repeat_interleave(CAPTIONS_EACH, dim=0) + noise, dim=1)


def clasp(images: Tensor, texts: Tensor) -> int:
    ids = [f"i{number}" for number in range(len(images))]
    names = [f"t{number}" for number in range(len(texts))]
    queries = RetrievalQueries(
        image_groups=dict(zip(ids, ids, strict=True)),
        text_groups={name: ids[number // CAPTIONS_EACH] for number, name in enumerate(names)},
        texts=lambda: [(names, PooledFeatures(texts))],
    )
    RetrievalTask(data="given", images=lambda: [(ids, PooledFeatures(images))], queries=queries).results(Given())
    return 1


def whole_matrix(images: Tensor, texts: Tensor) -> int:
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(texts)), torch.arange(len(texts)) // CAPTIONS_EACH] = True
    for of, right in ((scores, positive), (scores.T, positive.T)):
        for k in (1, 5, 10):
            found = []
            for start in range(0, len(of), BATCH):
                first = of[start : start + BATCH].topk(k, dim=1).indices
                hits = F.one_hot(first, num_classes=of.shape[1]) * right[start : start + BATCH, None]
                found.append(hits.sum(dim=(1, 2)) > 0)
            torch.cat(found).float().mean()
    return 1


def rows() -> Sequence[Row]:
    given = embeddings()
    work = f"retrieval, {IMAGES:,} x {IMAGES * CAPTIONS_EACH:,}"
    contestants = [Contestant("clasp", partial(clasp, *given)), Contestant("whole", partial(whole_matrix, *given))]
    rates = harness.race(contestants)
    taken = {name: Measured(name, tuple(1 / rate for rate in measured.values)) for name, measured in rates.items()}
    peaks = {name: harness.peak_elsewhere("retrieval", name) for name in PEAKS}
    process = {name: Measured("", (peak.process,)) for name, peak in peaks.items()}
    grown = {name: Measured("", (peak.grown,)) for name, peak in peaks.items()}
    peer, bound = "the whole matrix, as CLIP_benchmark", harness.profiled(contestants[0].run)
    note = (
        f"wanted: {TARGET_SECONDS:g} s and {TARGET_MEGABYTES:,.0f} MB; with median ranks and intervals, theirs without"
    )
    return [
        Row(work, "s", taken["clasp"], peer, taken["whole"], SLOWER, "lower", note, bound),
        Row(f"{work}: memory of the process", "MB", process["clasp"], peer, process["whole"], LARGER, "lower"),
        Row(f"{work}: above the embeddings", "MB", grown["clasp"], peer, grown["whole"], None, "lower"),
    ]


def peak(work: Callable[[Tensor, Tensor], int]) -> Peak:
    given = embeddings()
    few = max(20, IMAGES // 10)
    work(given[0][:few], given[1][: few * CAPTIONS_EACH])  # warm-up
    return harness.peak_of(partial(work, *given))


PEAKS = {"clasp": partial(peak, clasp), "whole": partial(peak, whole_matrix)}

if __name__ == "__main__":
    harness.main(rows, PEAKS)
