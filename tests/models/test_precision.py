"""The precision probe: decided by time, never by starting something long, and once per machine; and frozen passes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from clasp.data.feature_cache.features import text_features
from clasp.data.feature_cache.requests import TextFeatureRequest
from clasp.data.images import ImageTransform
from clasp.data.pairs import Pairs
from clasp.evaluation.embedding_table import embed_batches
from clasp.models import precision
from clasp.models.cache_policy import CachePolicy, FeatureCacheMode
from clasp.models.dual_encoder import DualEncoder
from clasp.models.feature_settings import FeatureCallbacks, FeatureSettings
from clasp.models.features import FeatureSource
from clasp.models.frozen import FrozenPrefix, FrozenTower
from clasp.models.head_settings import HeadSettings
from clasp.models.image_side import ImageSide
from clasp.models.inference import EmbeddingModel, EncoderPrecision
from clasp.models.plain_attention import plain_attention_everywhere
from clasp.models.precision import PrecisionChoice, detect_precision, resolve_precision
from clasp.models.tower import Tower
from clasp.models.tuning.spec import freeze_except
from clasp.plain_types import Precision
from toypairs import small_pairs, word_tokenizer
from toytowers import base


@pytest.mark.parametrize(
    ("speed", "expected", "sizes"),
    [
        (2.0, "bfloat16", [32, 64, 128, 256, 512]),
        (1.1, "float32", [32, 64, 128, 256, 512]),  # faster, but the casts would eat it
        (1 / 300, "float32", [32, 64]),  # computed without instructions for it
        (1 / 30_000, "float32", [32]),
    ],
)
def test_probe(monkeypatch: pytest.MonkeyPatch, speed: float, expected: str, sizes: list[int]) -> None:
    asked = []

    def product(dtype: torch.dtype, size: int) -> float:
        seconds = 2 * size**3 / 1e11 / (speed if dtype == torch.bfloat16 else 1.0)
        asked.append((size, seconds))
        return seconds

    monkeypatch.setattr(precision, "time_matmul", product)
    found = precision._probe()
    assert found.precision == expected and f"{sizes[-1]} × {sizes[-1]}" in found.reason
    assert sorted({size for size, _ in asked}) == sizes
    assert max(seconds for _, seconds in asked[2:]) <= 0.005 if asked[2:] else True, "only the first may be long"


def test_measured_once_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache" / "precision.json"
    assert precision._recall(path) is None
    found = precision._measure(path)  # this machine's, truly
    assert "float32" in found.reason and precision._recall(path) == found
    monkeypatch.setattr(precision, "_machine", lambda: "another machine")
    assert precision._recall(path) is None
    other = precision._measure(path)
    assert precision._recall(path) == other
    monkeypatch.undo()
    assert precision._recall(path) == found, "that of the first is kept"
    assert [file.name for file in path.parent.iterdir()] == ["precision.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"%s": 3}', '{"%s": ["float16", "faster"]}'])
def test_a_record_that_cannot_be_used_is_measured_again(text: str, tmp_path: Path) -> None:
    path = tmp_path / "precision.json"
    path.write_text(text.replace("%s", precision._machine()))
    assert precision._recall(path) is None
    measured = precision._measure(path)
    assert precision._recall(path) == measured


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert precision._measure(tmp_path / "file" / "precision.json").precision in ("float32", "bfloat16")


def test_the_recipe_has_the_last_word_and_other_devices_stay_in_float32() -> None:
    assert resolve_precision("bfloat16", torch.device("cpu")) == ("bfloat16", "set by the recipe")
    assert resolve_precision("auto", torch.device("cpu")) == detect_precision(torch.device("cpu"))
    assert resolve_precision("auto", torch.device("meta")).precision == "float32"


# --- forward passes without gradients --------------------------------------------------------------------------------

PAIRS = Pairs("small", [small_pairs(5)])
TEXTS = ["a cat", "the red dog", "a"]
TRANSFORM = ImageTransform(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _frozen(name: str, choice: Precision, depth: int = 0) -> FrozenTower | FrozenPrefix:
    tower = Tower(base(name))
    freeze_except(tower, [])
    return FrozenPrefix(tower, depth, 32, choice) if depth else FrozenTower(tower, precision=choice)


@pytest.mark.parametrize("depth", [0, 1], ids=["pooled", "prefix"])
def test_features_in_two_precisions_are_two_files(tmp_path: Path, depth: int) -> None:
    rows = {}
    for choice in get_args(Precision):
        requests = TextFeatureRequest(_frozen("bert", choice, depth), word_tokenizer(), TEXTS)
        rows[choice] = text_features(requests, cache_folder=tmp_path).read(np.arange(3)).values
        assert rows[choice].dtype == torch.float32
    assert len(list((tmp_path / "features").glob("*.npy"))) == 2
    assert not torch.equal(*rows.values())
    torch.testing.assert_close(rows["bfloat16"], rows["float32"], rtol=0.05, atol=0.05)


def test_in_float32_the_key_is_that_of_the_weights() -> None:
    part = _frozen("bert", "float32")
    assert part.fingerprint == part.tower.layer_fingerprint != _frozen("bert", "bfloat16").fingerprint


@pytest.mark.parametrize(("name", "changes"), [("vit", True), ("efficientnet", False)])
def test_the_attention_kernel_is_in_the_key_of_what_attends(name: str, changes: bool) -> None:
    part = FrozenTower(Tower(base(name)).requires_grad_(False))
    before = part.fingerprint
    with plain_attention_everywhere():
        assert (part.fingerprint != before) == changes


def test_convolutional_towers_stay_in_float32(tmp_path: Path) -> None:
    settings = FeatureSettings(CachePolicy(tmp_path), precision=PrecisionChoice("bfloat16", "faster here"))
    said: list[str] = []
    callbacks = FeatureCallbacks(notify=said.append)
    found = {}
    for name in ("vit", "efficientnet"):
        side = ImageSide(Tower(base(name)).requires_grad_(False), TRANSFORM, settings, callbacks)
        assert side.features(PAIRS) is not None and side.frozen_part is not None
        found[name] = side.frozen_part.precision
    assert found == {"vit": "bfloat16", "efficientnet": "float32"}
    [line] = said
    assert "bfloat16" in line and "faster here" in line and "train.precision=float32" in line


def test_embeddings_in_bfloat16_are_float32_and_of_another_index() -> None:
    image, text = Tower(base("vit")), Tower(base("bert"))
    encoder = DualEncoder(image, text, HeadSettings(), seed=0).eval()
    exact = EmbeddingModel(encoder, TRANSFORM, word_tokenizer())
    fast = EmbeddingModel(encoder, TRANSFORM, word_tokenizer(), precision=EncoderPrecision("bfloat16", "bfloat16"))
    mixed = EmbeddingModel(encoder, TRANSFORM, word_tokenizer(), precision=EncoderPrecision(text="bfloat16"))
    pixels = torch.randn(3, 3, 32, 32)
    for ours, theirs in (
        (fast.encode_pixels(pixels), exact.encode_pixels(pixels)),
        (fast.encode_text(TEXTS), exact.encode_text(TEXTS)),
    ):
        assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)
        assert float((ours * theirs).sum(dim=1).min()) > 0.999
        torch.testing.assert_close(ours.norm(dim=1), torch.ones(3))
    assert exact.fingerprint == mixed.fingerprint != fast.fingerprint, "images decide: a query may be in either"
    for model in (exact, fast, mixed):  # a store made on another machine is searched, and added to, in its precision
        for store in (exact, fast):
            found = model.in_precision_of(store.fingerprint)
            assert found.fingerprint == store.fingerprint and found.precision.text == model.precision.text
        assert model.in_precision_of("") is model.in_precision_of("another model") is model


@pytest.mark.parametrize("mode", ["off", "auto"], ids=["live", "cached"])
def test_evaluation_computes_as_encoding_does(tmp_path: Path, mode: FeatureCacheMode) -> None:
    """Live towers in the recipe's precision, heads over cached features of locked towers in float32."""
    model = DualEncoder(Tower(base("vit")), Tower(base("bert")), HeadSettings(), seed=0).eval()
    embeddings = {}
    for choice in get_args(Precision):
        settings = FeatureSettings(CachePolicy(tmp_path, mode), precision=PrecisionChoice(choice, "set here"))
        source = FeatureSource(
            model.image, model.text, transform=TRANSFORM, tokenizer=word_tokenizer(), settings=settings
        )
        encoder = source.in_precision(model)
        assert encoder.fingerprint == model.fingerprint and (encoder is model) == (choice == "float32")
        images = embed_batches(source.images(PAIRS)(), encoder.embed_image, "image").vectors
        texts = embed_batches(source.texts({text: text for text in TEXTS})(), encoder.embed_text, "text")
        embeddings[choice] = images, texts.vectors
        encoded = EmbeddingModel(model, TRANSFORM, word_tokenizer(), precision=source.precision)
        if mode == "off":
            pixels = torch.cat([inputs.values for _, inputs in source.images(PAIRS)()])
            assert torch.equal(images, encoded.encode_pixels(pixels))
            rows = [TEXTS.index(text) for text in texts.ids]
            assert torch.equal(texts.vectors, encoded.encode_text(TEXTS)[rows])
        else:  # the head multiplies what is cached in float32
            features = source.image_features(PAIRS)
            assert features is not None
            assert torch.equal(images, model.embed_image(features.read(np.arange(5))))
    for exact, fast in zip(*(embeddings[choice] for choice in get_args(Precision)), strict=True):
        assert not torch.equal(exact, fast) and float((exact * fast).sum(dim=1).min()) > 0.999
