"""Captions that the text tower reads alike are refused before any compute, by training, its doctor and ``auto``."""

from __future__ import annotations

import json
import re
from itertools import cycle
from pathlib import Path

import pytest

from clasp.commands.auto import climb
from clasp.commands.auto_stages import AutoCallbacks
from clasp.commands.doctor import diagnose
from clasp.config.recipe import recipe_from_dict
from clasp.types import UserError
from toydata import toys, write_images
from toyruns import recipe, run

TOYS = toys(24)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))


ALIKE = {  # captions that the toy tower reads alike, settings, and words of the error
    "equal": (["a red circle"], [], "every caption to train on is 'a red circle'"),
    "of unknown tokens": (["ein Hund", "eine Katze saß dort"], [], "unknown to its vocabulary"),
    "different in unknown tokens": (["a photo of Hund", "a photo of Katze"], [], "unknown to its vocabulary"),
    "empty after cleaning": (["?", "!"], ["text.clean=lilt"], "the same tokens with text.clean = 'lilt'"),
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


@pytest.mark.parametrize("captions", [["a red circle", "a blue circle"], ["a red blue", "a blue red"], ["a", "Hund"]])
def test_two_captions_are_enough(captions: list[str], towers: Path, tmp_path: Path) -> None:
    assert run(recipe(towers, captioned(tmp_path, captions)), tmp_path / "run").results


def captioned(folder: Path, captions: list[str]) -> Path:
    """Pairs with these captions in turns."""
    write_images(TOYS, folder)
    rows = [
        {"image": f"images/{toy.key}.png", "caption": text} for toy, text in zip(TOYS, cycle(captions), strict=False)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"
