"""The demo in its quick form: it finds held-out concepts, and nothing when its pairs are shuffled and alone.

As everybody runs it, in the precision that the machine does best: in bfloat16, texts take half as long.
"""

from __future__ import annotations

import importlib.metadata
import json
from importlib.resources import files
from pathlib import Path

import pytest
from torch import Tensor

from clasp.commands import demo as story
from clasp.commands import demo_searches as searches
from clasp.commands.demo_photos import PHOTO_QUERIES, installed_photos
from clasp.commands.train import train_recipe
from clasp.config.build import load
from clasp.data.cache_folder import cache_folder
from clasp.data.images import ImageTransform
from clasp.data.samples.emoji import (
    LANGUAGE_NAMES,
    TRAINED_LANGUAGES,
    TRAINED_LOW_RESOURCE,
    EmojiSample,
    concept_names,
    unpack_emoji_sample,
)
from clasp.models import precision
from clasp.models.features import FeatureSource
from clasp.models.precision import _detect as detect_on_this_machine
from clasp.models.tower import Tower
from clasp.types import Pixels, Tokens, UserError

CHANCE = 5 / 138


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, float32_by_default: None):
    """One cache for the whole module: the towers read the sample once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_detect", detect_on_this_machine)
        patch.setenv("CLASP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> story.DemoResult:
    return story.run_demo(tmp_path_factory.mktemp("runs") / "demo", quick=True)


def recall(told: story.DemoResult, language: str) -> float:
    return next(row.metrics["recall@5"] for row in told.results if row.language == language)


def test_finds_what_it_never_saw(told: story.DemoResult):
    assert recall(told, "en") > 0.30
    assert recall(told, "macro:trained") > 0.18
    assert recall(told, "macro:low-resource, never trained") > 0.12
    for language in ("en", "macro:trained", "macro:low-resource, never trained"):
        assert told.untrained[f"{language}/image_to_text/recall@5"] < CHANCE + 0.04


def test_draws_and_keeps(told: story.DemoResult):
    assert told.picture.read_bytes().startswith(b"\x89PNG")
    counts = load(told.run).encoder.parameter_counts()
    assert counts["model"].percent < 7
    languages = [json.loads(line)["language"] for line in (told.run / "results.jsonl").read_text().splitlines()]
    assert "macro:trained" in languages


def test_a_second_run_reads_no_tower(
    told: story.DemoResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def refuse(*_: object) -> None:
        raise AssertionError("a tower was run again")

    monkeypatch.setattr(ImageTransform, "__call__", refuse)
    reads = []
    whole = Tower.pooled

    def counted(self: Tower, inputs: Pixels | Tokens) -> Tensor:
        if isinstance(inputs, Tokens):  # a picture could not be read; a blank one says how wide the tower is
            reads.append(len(inputs.ids))
        return whole(self, inputs)

    monkeypatch.setattr(Tower, "pooled", counted)
    again = story.run_demo(told.run.with_name("demo"), quick=True)
    assert [row.metrics for row in again.results] == [row.metrics for row in told.results]
    assert reads == [1] * (len(told.drawings) + len(told.photos)), "only the words searched for are new"
    card = (told.run / "README.md").read_text(encoding="utf-8")
    assert card.count("Held-out concepts, by language") == 1 and "| Zulu, never trained on |" in card
    assert "holds this demo's run already" in capsys.readouterr().err


def test_what_is_asked_is_decided_by_rule(told: story.DemoResult):
    names = concept_names()
    trained = {*TRAINED_LANGUAGES, *TRAINED_LOW_RESOURCE}
    for asked in (searches.DRAWING_LANGUAGES, [query.language for query in PHOTO_QUERIES]):
        assert len(set(asked)) == len(asked) and set(asked) <= set(LANGUAGE_NAMES)
    assert [language in trained for language in searches.DRAWING_LANGUAGES] == [True, False] * 4
    assert all(query.language in names[query.concept] for query in PHOTO_QUERIES)
    assert {query.photo for query in PHOTO_QUERIES} <= set(installed_photos())
    assert [search.language for search in told.drawings] == list(searches.DRAWING_LANGUAGES)
    assert len({search.english for search in told.drawings}) == 8
    assert all(len(search.hits) == searches.DRAWING_HITS for search in told.drawings)


def test_photographs_have_licences():
    text = (files("clasp.data.samples") / "files" / "LICENSES.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in installed_photos())


def test_a_missing_package_is_one_line_before_any_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = importlib.metadata.distribution

    def missing(name: str) -> importlib.metadata.Distribution:
        if name == "scikit-image":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(story, "train_recipe", lambda *_, **__: pytest.fail("trained first"))
    with pytest.raises(UserError, match=r"pip install --no-deps scikit-image==\d") as error:
        story.run_demo(tmp_path / "demo", quick=True)
    assert "\n" not in str(error.value)


def test_shuffled_pairs_stay_at_chance(told: story.DemoResult, tmp_path: Path):
    sample = unpack_emoji_sample(cache_folder(), quick=True)
    rows = [json.loads(line) for line in sample.pairs("train").read_text(encoding="utf-8").splitlines()]
    captions, shift = [row["caption"] for row in rows], len(rows) // 3
    for row, caption in zip(rows, captions[shift:] + captions[:shift], strict=True):
        row["caption"], row["image"] = caption, str(sample.folder / row["image"])
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = story.demo_recipe(sample, quick=True).with_overrides(
        [f"data.train={tmp_path / 'train.jsonl'}", f"data.image_root={sample.folder}", "data.class_weight=0"]
    )
    train_recipe(recipe, tmp_path / "shuffled", say=lambda line: None)
    model = load(tmp_path / "shuffled")
    metrics = story.build_demo_task(sample, _inputs(sample, model, recipe), quick=True)(model.encoder)
    for language in ("en", "macro:trained"):
        away = abs(metrics[f"{language}/image_to_text/recall@5"] - CHANCE)
        assert away < 0.05, f"{language}: of 138 pictures, three standard errors"


def _inputs(sample: EmojiSample, model, recipe) -> FeatureSource:
    from clasp.config.build import ModelAndPreprocessing, build_feature_source

    return build_feature_source(ModelAndPreprocessing(model.encoder, model.transform, model.tokenizer), recipe)
