"""Captions that the text tower reads alike are refused before any compute, by training, its doctor and ``auto``."""

from __future__ import annotations

import json
import re
import shutil
from itertools import cycle
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from clasp.commands.auto import climb
from clasp.commands.auto_stages import AutoCallbacks
from clasp.commands.compare import compare_models
from clasp.commands.doctor import diagnose
from clasp.commands.evaluate import evaluate_run
from clasp.config.recipe import recipe_from_dict
from clasp.data.distinct_captions import indistinct_captions
from clasp.data.tokenizer import Tokenizer
from clasp.types import UserError
from toydata import toys, write_images
from toyruns import lines, recipe, run

TOYS = toys(24)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))


ALIKE = {  # captions that the toy tower reads alike, settings, and words of the error
    "equal": (["a red circle"], [], "every caption to train on is 'a red circle'"),
    "of unknown tokens": (["ein Hund", "eine Katze saß dort"], [], "unknown to its vocabulary"),
    "different in unknown tokens": (["a photo of Hund", "a photo of Katze"], [], "unknown to its vocabulary"),
    "empty after cleaning": (["?", "!"], ["text.clean=lilt"], "the same tokens with text.clean = 'lilt'"),
    "of known words with others around": (
        ["red Hund", "ein Hund red", "Hund red"],
        [],
        "what differs in them is unknown",
    ),
    "cut": (["a photo of a red ring", "a photo of a blue ring"], ["text.max_tokens=5"], "and text.max_tokens = 5"),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_captions_that_the_text_tower_reads_alike_are_refused(kind: str, towers: Path, tmp_path: Path) -> None:
    captions, changes, words = ALIKE[kind]
    made = recipe(towers, captioned(tmp_path, captions), *changes)
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    told = {report.about: report for report in diagnose(made)}["captions"]
    assert [finding.text for finding in told.findings if finding.level == "stop"] == [str(refused.value)]
    given = {name: made.to_dict()[name] for name in ("image", "text", "data")} | {"auto": {"steps": 10}}
    with pytest.raises(UserError, match=re.escape(words)):
        climb(recipe_from_dict(given, "toy"), tmp_path / "auto", AutoCallbacks(lambda line: None))
    assert not (tmp_path / "auto").exists(), "the name is free again"


TOLD_APART = [
    ["a red circle", "a blue circle"],
    ["a red blue Hund", "a blue red Hund"],
    ["red Hund", "Hund red"],
    ["a", "Hund"],
]


@pytest.mark.parametrize("captions", TOLD_APART)
def test_two_captions_are_enough(captions: list[str], towers: Path, tmp_path: Path) -> None:
    assert run(recipe(towers, captioned(tmp_path, captions)), tmp_path / "run").results


def test_an_evaluation_says_where_the_text_tower_reads_texts_alike(towers: Path, tmp_path: Path) -> None:
    run(recipe(towers, captioned(tmp_path, ["a red circle", "a blue circle"]), "train.epochs=0"), tmp_path / "run")
    (tmp_path / "unknown").mkdir()
    data, said = captioned(tmp_path / "unknown", ["Hund", "Katze"]), list[str]()
    evaluate_run(tmp_path / "run", "retrieval", [f"data={data}"], say=said.append)
    (line,) = (line for line in said if "cannot tell apart" in line)
    words = "the text tower cannot tell apart the 2 different texts to evaluate on, such as "
    assert line.startswith(f"warning: {tmp_path / 'run'}: {words}") and line.endswith("results on them are near chance")

    shutil.copytree(tmp_path / "run", tmp_path / "other")
    rows = [{**row, "class": name} for row, name in zip(lines(data), cycle(("Hund", "Katze")), strict=False)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [f"data={data}", 'templates=["a photo of a {}.", "a red {}."]']  # of two templates, no two are alike
    said.clear()
    corruptions = "corruptions=contrast,brightness"
    evaluate_run(tmp_path / "run", "robustness", [*prompts, corruptions], out=tmp_path / "out", say=said.append)
    compare_models((tmp_path / "run", tmp_path / "other"), "zeroshot", prompts, say=said.append)
    warned = [line.partition(": the text")[0] for line in said if "cannot tell apart" in line]
    assert warned == [f"warning: {tmp_path / name}" for name in ("run", "run", "other")], "once a model"


BYTES = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
PIECES = [("<unk>", 0.0), ("▁", -1.0), ("▁a", -1.0), ("a", -2.0), ("b", -2.0)]
FALLBACK = [("<unk>", 0.0), ("▁", -1.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
LETTERS = {"[UNK]": 0, "a": 1, "b": 2}
CLIP = {**BYTES, "<|endoftext|>": len(BYTES)}
TOKENIZERS = {  # the model, what splits a text, and whether some text is unknown to it
    "bytes": (models.BPE(BYTES, []), pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "bytes that name an end": (
        models.BPE(CLIP, [], unk_token="<|endoftext|>"), pre_tokenizers.ByteLevel(add_prefix_space=False), False
    ),
    "pieces": (models.Unigram(PIECES, 0, False), pre_tokenizers.Metaspace(), True),
    "pieces that fall back to bytes": (models.Unigram(FALLBACK, 0, True), pre_tokenizers.Metaspace(), False),
    "letters": (models.WordLevel(LETTERS, "[UNK]"), pre_tokenizers.Split("", "isolated"), True),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_only_what_a_tokenizer_reads_alike_is_refused(kind: str) -> None:
    model, splitter, lacks = TOKENIZERS[kind]
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = splitter
    tokenizer = Tokenizer(backend)
    for captions in (["a", "b"], ["ab", "ba"], ["ab", "abb"], ["aß", "a"], ["ßa", "aß"], ["abß", "baß"]):
        assert indistinct_captions(captions, tokenizer) == "", captions
    for captions in (["狗", "猫"], ["a 狗", "a 猫"]):
        reason = indistinct_captions(captions, Tokenizer(backend, prefix="ß "))
        assert ("unknown to its vocabulary; choose another text.tower" in reason) == lacks, captions


def captioned(folder: Path, captions: list[str]) -> Path:
    """Pairs with these captions in turns."""
    write_images(TOYS, folder)
    rows = [
        {"image": f"images/{toy.key}.png", "caption": text} for toy, text in zip(TOYS, cycle(captions), strict=False)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"
