"""A bare word that is a path, in every verb that takes ``key=value``: the error names the key that it is for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from clasp import cli
from clasp.commands.repeated_lines import said_once
from clasp.data.formats.setting_hints import suggest_key

PAIR = ["--image", "pip:a", "--text", "pip:b"]


@pytest.mark.parametrize(
    ("words", "suggested"),
    [
        (["train", "start", "pics"], "data.train=pics"),
        (["train", "start", "data.train=x", "pics"], "data.val=pics"),
        (["train", "auto", "my pics"], "data.train='my pics'"),
        (["train", "pics"], "start data.train=pics"),
        (["train", "pairs.csv"], "start data.train=pairs.csv"),
        (["doctor", "start", "pics"], "data.train=pics"),
        (["params", "start", "pics"], "data.train=pics"),
        (["pair", *PAIR, "pics"], "data.train=pics"),
        (["eval", "RUN", "zeroshot", "pics"], "data=pics"),
        (["eval", "RUN", "knn", "data=x", "pics"], "fit=pics"),
        (["eval", "RUN", "pics"], "zeroshot data=pics"),
        (["compare", "A", "B", "retrieval", "pics"], "data=pics"),
        (["analyze", "RUN", "pics"], "data=pics"),
        (["maps", "RUN", "pics"], "data=pics"),
    ],
    ids=" ".join,
)
def test_a_path_without_its_key(
    words: list[str],
    suggested: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name in ("pics", "my pics"):
        (tmp_path / name).mkdir()
    (tmp_path / "pairs.csv").write_text("image,caption\na.jpg,a cat\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clasp", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert f"it is a path: did you mean {suggested}?" in said


def test_other_words_and_keys_that_are_given_have_no_hint(tmp_path: Path):
    assert suggest_key("no such file", ("data.train",), ()) == suggest_key("a\0b", ("data.train",), ()) == ""
    assert suggest_key(str(tmp_path), ("data.train",), ["data.train"]) == ""


def test_a_line_is_said_once():
    said: list[str] = []
    say = said_once(said.append)
    for line in ("features of a are computed in bfloat16", "stage 2", "features of a are computed in bfloat16"):
        say(line)
    assert said == ["features of a are computed in bfloat16", "stage 2"]
