"""Captions against the tokenizer and class names against each other, on worked examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from clasp.data.pairs import Pairs, open_pairs
from clasp.data.text_checks import check_classes, check_languages
from clasp.data.tokenizer import Tokenizer
from clasp.models.zoo.from_scratch import load_clip_tokenizer
from toydata import toys, write_classes, write_images
from toyruns import save_text_tower

TOYS = toys(30)


def levels(report) -> dict[str, str]:
    return {level: " ".join(f.text for f in report.findings if f.level == level) for level in ("ok", "look", "stop")}


def spoken(folder: Path, **captions: str | list[str]) -> Pairs:
    write_images(TOYS[:2], folder)
    rows = [{"image": f"images/{toy.key}.png", "caption": captions} for toy in TOYS[:2]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return open_pairs(folder / "pairs.jsonl")


def test_the_share_of_unknown_tokens_is_of_each_language(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_text_tower(tmp_path / "tower"), prefix="what is this: ")
    report = check_languages(spoken(tmp_path, en="a red circle", de="ein rot Kreis ."), tokenizer)
    assert report.facts["en"]["unknown_share"] == 0  # the prefix is not counted
    assert report.facts["de"]["unknown_share"] == pytest.approx(2 / 4)
    assert "1 caption in de: 50.0 % of the tokens are unknown; the vocabulary" in levels(report)["look"]
    assert "1 caption in en: 0.0 % of the tokens are unknown" in levels(report)["ok"]


def test_a_byte_level_tokenizer_takes_more_tokens_for_a_language_that_it_lacks(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(dict(_bytes()), []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(backend)
    assert tokenizer.unknown_id is None
    report = check_languages(spoken(tmp_path, en="a red", hi="लाल"), tokenizer)
    assert report.facts["hi"]["unknown_share"] is None and report.facts["hi"]["tokens_per_character"] == 3
    assert "in hi: 3 tokens a character; the vocabulary" in levels(report)["look"]
    assert "in en: 1 tokens a character" in levels(report)["ok"]


def test_a_language_of_most_captions_is_not_given_up(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_text_tower(tmp_path / "tower"))
    tower = "pip:multilingual-e5-small"
    for captions, fix in (
        ({"en": ["a red circle", "a blue ring"], "de": "ein rot Kreis"}, ('data.languages=["en"]',)),
        ({"en": "a red circle", "de": ["ein rot Kreis", "ein blau Ring"]}, ()),
    ):
        report = check_languages(spoken(tmp_path, **captions), tokenizer, tower)
        assert [finding.fix for finding in report.findings if finding.level == "look"] == [fix]


def _bytes() -> list[tuple[str, int]]:
    return [(symbol, number) for number, symbol in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))]


def test_classes_are_counted_and_those_that_are_not_trained_named(tmp_path: Path) -> None:
    balanced = open_pairs(write_classes(TOYS, tmp_path / "even"))
    report = check_classes(balanced, balanced)
    assert report is not None and not levels(report)["look"]
    red = [toy for toy in toys(400) if (toy.colour, toy.shape) == ("red", "ring")]
    uneven = open_pairs(write_classes([*red, TOYS[0], TOYS[1]], tmp_path / "uneven"))
    report = check_classes(uneven, balanced)
    assert report is not None
    assert report.facts["largest"] == {"a red ring": len(red)} and len(red) > 10
    assert list(report.facts["smallest"].values()) == [1]
    assert "zero-shot accuracy will favour the large ones" in levels(report)["look"]
    count = len(report.facts["only_validated"])
    assert count and f"validated on and not trained on: {count} class" in levels(report)["look"]


def test_one_class_cannot_be_validated_on(tmp_path: Path) -> None:
    red = [toy for toy in toys(400) if (toy.colour, toy.shape) == ("red", "ring")]
    pairs = open_pairs(write_classes(red, tmp_path / "one"))
    report = check_classes(pairs, pairs)
    assert report is not None and "needs at least two classes; there is only 'a red ring'" in levels(report)["stop"]


def test_captions_are_no_classes(tmp_path: Path) -> None:
    pairs = spoken(tmp_path, en="a red circle")
    assert check_classes(pairs, pairs) is None


def test_clip_names_its_end_token_as_unknown_and_never_needs_it() -> None:
    assert load_clip_tokenizer(77).unknown_id is None
