"""What would be cached is known before anything is computed: the dtype, the bytes, and whether it is there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clasp.data.feature_cache.arrays import ArrayWriter, load_or_compute
from clasp.data.feature_cache.features import text_features
from clasp.data.feature_cache.requests import FeatureRequest, ImageFeatureRequest, TextFeatureRequest
from clasp.data.images import Augment
from clasp.data.pairs import Pairs
from clasp.models import cache_policy
from clasp.models.cache_policy import CachePlan, CachePolicy, plan_features
from clasp.types import PooledFeatures
from toypairs import TRANSFORM, small_pairs, word_tokenizer

TEXTS = ["a cat", "the red dog", "a", "a cat"]  # 2 + 3 + 1 tokens


@dataclass(frozen=True)
class NeverRun:
    """A frozen part of ``depth`` blocks that must not be run."""

    depth: int = 0
    width: int = 4
    tokens: int = 1
    layers: tuple[tuple[int, int], ...] = ()

    @property
    def fingerprint(self) -> str:
        return f"after {self.depth} blocks"

    def __call__(self, inputs: Any) -> Any:
        raise AssertionError("a tower ran")


def images(depth: int = 0, tokens: int = 1, **views: Any) -> ImageFeatureRequest:
    return ImageFeatureRequest(NeverRun(depth, tokens=tokens), Pairs("toy", [small_pairs(10)]), TRANSFORM, **views)


def texts(*chosen: str, depth: int = 0) -> TextFeatureRequest:
    return TextFeatureRequest(NeverRun(depth), word_tokenizer(), chosen)


def plan_all(requests: Sequence[FeatureRequest], policy: CachePolicy) -> list[CachePlan]:
    return plan_features([(request, policy) for request in requests])


def free(monkeypatch: pytest.MonkeyPatch, folder: Path, count: int) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(cache_policy.shutil, "disk_usage", lambda at: usage._replace(free=count))


def test_plans_have_counts_bytes_and_dtypes_and_nothing_is_written(tmp_path: Path):
    requests = [
        images(),
        images(depth=2, tokens=17),
        images(augment=Augment(flip=0.5), views=3),
        texts(*TEXTS),
        texts(*TEXTS, depth=2),
    ]
    plans = plan_all(requests[:4], CachePolicy(tmp_path))
    assert [(plan.what, plan.count, plan.storage, plan.bytes) for plan in plans] == [
        ("images", 10, "float32", 10 * 4 * 4),
        ("images", 10, "float16", 10 * 17 * 4 * 2),
        ("images", 10, "float32", 3 * 10 * 4 * 4),
        ("captions", 3, "float32", 3 * 4 * 4),
    ]
    (states,) = plan_all(requests[4:], CachePolicy(tmp_path))
    assert (states.count, states.storage, states.bytes) == (3, "float16", (2 + 3 + 1) * 4 * 2)
    (chosen,) = plan_all(requests[4:], CachePolicy(tmp_path, "int8"))
    assert (chosen.storage, chosen.bytes) == ("int8", (2 + 3 + 1) * (4 + 4))
    assert all(plan.file is None and plan.bytes_to_write == plan.bytes for plan in plans)
    assert list(tmp_path.iterdir()) == []


def test_each_file_is_planned_once_and_texts_are_found_among_earlier_ones(tmp_path: Path):
    requests = [images(), texts(*TEXTS), images(), texts("a"), texts("a cat", "a"), texts("two dog")]
    plans = plan_all(requests, CachePolicy(tmp_path))
    assert [(plan.what, plan.count) for plan in plans] == [("images", 10), ("captions", 3), ("captions", 1)]


def test_states_may_fill_a_quarter_of_what_earlier_plans_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    size = images(depth=2).num_bytes("float16")
    free(monkeypatch, tmp_path, 4 * size)
    policy = CachePolicy(tmp_path)
    assert policy.plan(images(depth=2)).storage == "float16"
    assert policy.plan(images(depth=2), reserved_bytes=4).storage is None
    first, second = plan_all([images(depth=2), texts(*["a cat"] * 3, *TEXTS, depth=2)], policy)
    assert first.storage == second.storage == "float16" and 4 * second.bytes < 4 * size - first.bytes
    first, second = plan_all([images(depth=2), images(depth=3)], policy)
    assert first.storage == "float16" and second.storage is None and second.bytes_to_write == 0
    whole, chosen = policy.plan(images()), CachePolicy(tmp_path, "float16").plan(images(depth=3), reserved_bytes=9999)
    assert whole.storage == "float32" and chosen.storage == "float16", "the size decides states in auto only"


def test_texts_that_are_not_cached_are_no_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, part = texts(*TEXTS, depth=2), texts("a", depth=2)
    free(monkeypatch, tmp_path, 4 * part.num_bytes("float16"))
    plans = plan_all([whole, part], CachePolicy(tmp_path))
    assert [plan.storage for plan in plans] == [None, "float16"]


def test_what_is_there_is_named_and_takes_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Zeros(NeverRun):
        def __call__(self, inputs: Any) -> PooledFeatures:
            return PooledFeatures(torch.zeros(len(inputs.ids), self.width))

    request = TextFeatureRequest(Zeros(), word_tokenizer(), TEXTS)
    made = text_features(request, cache_folder=tmp_path)
    (plan,) = plan_all([texts(*reversed(TEXTS))], CachePolicy(tmp_path))
    assert plan.file == made.kept.path and plan.bytes_to_write == 0
    assert plan_all([texts("a")], CachePolicy(tmp_path))[0].file is None


def test_what_an_unfinished_build_has_is_on_disk_already(tmp_path: Path):
    """Of these features; those that others are computing are not."""
    request, policy, name = texts(*TEXTS), CachePolicy(tmp_path), tmp_path / "features" / "another.part"
    shape = (request.rows, request.part.width)
    name.parent.mkdir()
    name.write_bytes(b"1" * 100_000)
    assert policy.plan(request).started_bytes == 0

    def fill(writer: ArrayWriter) -> None:
        writer.write(np.arange(shape[0]), torch.ones(shape))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_compute(name.parent, request.key, shape, fill)
    plan = policy.plan(request)
    assert plan.started_bytes > 0 and plan.bytes_to_write == plan.bytes
