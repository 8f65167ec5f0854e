"""Three processes (gloo) evaluate as one does: the same embeddings in the same order, or the same error on all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clasp.data.images import ImageTransform
from clasp.data.pairs import Pairs
from clasp.evaluation.embedding_table import EmbeddingTable, EvaluationInputs, embed_batches
from clasp.evaluation.shared_encoder import SharedEncoder
from clasp.models.cache_policy import CachePolicy, FeatureCacheMode
from clasp.models.dual_encoder import DualEncoder
from clasp.models.feature_settings import FeatureCallbacks, FeatureSettings
from clasp.models.features import FeatureSource
from clasp.models.head_settings import HeadSettings
from clasp.models.tower import Tower
from clasp.training.distributed import Processes
from clasp.types import Encoder, SkippedSample, UserError
from toypairs import small_pairs, word_tokenizer
from toyprocesses import start
from toytowers import base

TRANSFORM = ImageTransform(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
DAMAGED = {2, 9}
TEXTS = ["a cat", "the red dog", "a", "cat", "two cat", "dog", "red"]
MORE_TEXTS = ["two dog", *TEXTS]


def world(folder: Path, mode: FeatureCacheMode, reported: list[str]) -> tuple[DualEncoder, FeatureSource]:
    """Locked towers; what could not be read is added to ``reported``."""
    model = DualEncoder(Tower(base("vit")), Tower(base("bert")), HeadSettings(width=8), seed=0).eval()
    model.requires_grad_(False)

    def on_skipped(found: Sequence[SkippedSample]) -> None:
        reported.extend(sample.id for sample in found)

    settings = FeatureSettings(CachePolicy(folder, mode))
    callbacks = FeatureCallbacks(on_skipped=on_skipped)
    made = FeatureSource(
        model.image,
        model.text,
        transform=TRANSFORM,
        tokenizer=word_tokenizer(),
        settings=settings,
        callbacks=callbacks,
    )
    return model, made


def pairs_of(count: int, damaged: set[int]) -> Pairs:
    return Pairs("small", [small_pairs(count, damaged=damaged)])


def small_batches(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("clasp.models.image_side.inference_batch_size", lambda size, device: 2)
    patch.setattr("clasp.models.text_side.TOKENS_PER_FORWARD", 6)
    patch.setattr("clasp.models.image_side._CACHED_BATCH_SIZE", 3)
    patch.setattr("clasp.models.text_side._CACHED_BATCH_SIZE", 3)


def tables(inputs: EvaluationInputs, encoder: Encoder, pairs: Pairs) -> dict[str, tuple[Sequence[str], Tensor]]:
    """Ids and embeddings of the images, read twice, and of the texts."""
    stream = inputs.images(pairs)
    embed_batches(stream(), encoder.embed_image, "image")
    found: dict[str, EmbeddingTable] = {
        "images": embed_batches(stream(), encoder.embed_image, "image"),
        "texts": embed_batches(inputs.read(TEXTS), encoder.embed_text, "text"),
    }
    return {name: (table.ids, table.vectors) for name, table in found.items()}


def alone(folder: Path, mode: FeatureCacheMode, pairs: Pairs) -> dict[str, tuple[Sequence[str], Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        small_batches(patch)
        model, inputs = world(folder, mode, [])
        return tables(inputs, model, pairs)


def shared(processes: Processes, folder: Path) -> dict[str, Any]:
    """What each case finds on a process, and which images it reported."""
    found: dict[str, Any] = {}

    def case(name: str, at: Path, mode: FeatureCacheMode, pairs: Pairs, earlier: Sequence[str] = ()) -> None:
        reported: list[str] = []
        model, inputs = world(at, mode, reported)
        if earlier:
            list(inputs.read(earlier))
        both = SharedEncoder(model, inputs, processes)
        found[name] = {**tables(both, both, pairs), "reported": reported}

    second = processes.rank == 1
    pairs = pairs_of(13, DAMAGED)
    with pytest.MonkeyPatch.context() as patch:
        small_batches(patch)
        case("live", folder / "live", "off", pairs)
        case("few", folder / "few", "off", pairs_of(2, set()))
        case("cached", folder / "cached", "float32", pairs)
        case("one live", folder / "one-live", "off" if second else "float32", pairs)
        case("read before", folder / "before", "float32", pairs, () if second else MORE_TEXTS)
        # as on two nodes, of which one cannot read two images: 4 is of the second process, 11 of the third
        case("nodes", folder / f"node-{second:d}", "float32", pairs_of(13, {4, 11} if second else set()))
        model, inputs = world(folder / "bad", "off", [])
        try:
            list(SharedEncoder(model, inputs, processes).images(pairs_of(13, {0, 1, 5, 11, 12}))())
        except UserError as error:
            found["too many"] = str(error)
    return found


def test_three_processes_evaluate_as_one(tmp_path: Path) -> None:
    assert start(3, tmp_path, partial(shared, folder=tmp_path)) == [0, 0, 0]
    pairs = pairs_of(13, DAMAGED)
    live, cached = alone(tmp_path, "off", pairs), alone(tmp_path / "alone", "float32", pairs)
    whole = alone(tmp_path, "off", pairs_of(13, set()))
    ids, rows = whole["images"]
    readable = [number for number in range(13) if number != 4]
    expected = {
        "live": live,
        "few": {"images": (ids[:2], rows[:2]), "texts": live["texts"]},
        "cached": cached,
        "one live": live,
        "read before": cached,
        "nodes": {"images": ([ids[number] for number in readable], rows[readable]), "texts": cached["texts"]},
    }
    skipped = {name: ["pair 2", "pair 9"] for name in expected} | {"few": [], "nodes": ["pair 4"]}
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name, tables_of_one in expected.items():
            assert found[name]["reported"] == skipped[name], "each once, on every process"
            for what, (names, vectors) in tables_of_one.items():
                assert list(found[name][what][0]) == list(names), f"{name}: {what}"
                torch.testing.assert_close(found[name][what][1], vectors, rtol=0, atol=1e-5, msg=f"{name}: {what}")
        assert found["too many"].startswith("5 of 13 images cannot be read"), "allowed in each share by itself"
