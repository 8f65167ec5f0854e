"""The verb ``clasp export``: what it prints, targets from outside, and that nothing half-written stays."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clasp import cli
from clasp.commands.export import EXPORTERS, export_run
from clasp.types import UserError
from toydata import toys, write_folder
from toyruns import recipe, run, save_towers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(recipe(save_towers(folder), write_folder(toys(40), folder / "pairs"), "train.epochs=1"), folder / "run")
    return folder / "run"


def typed(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["clasp", "export", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_verb_prints_what_was_measured(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    capfd.readouterr()
    assert typed(monkeypatch, made, "--to", "onnx", "-o", tmp_path / "onnx", "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["to"] == "onnx" and facts["parity"]["text"][0]["difference"] <= 1e-5
    assert typed(monkeypatch, made, "--to", "hub", "-o", tmp_path / "hub") == 0
    said = capfd.readouterr()
    assert "loads with clasp.load" in said.out + said.err


def test_what_the_verb_refuses_is_one_line(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    capfd.readouterr()
    assert typed(monkeypatch, made, "--to", "tensorrt", "-o", tmp_path / "out") == 2
    said = capfd.readouterr().err
    assert all(name in said for name in EXPORTERS) and said.strip().count("\n") == 0
    assert typed(monkeypatch, made, "--to", "hub", "--int8", "-o", tmp_path / "out") == 2
    assert "--int8 is for --to onnx, not for --to hub" in capfd.readouterr().err
    (tmp_path / "file").touch()
    assert typed(monkeypatch, made, "--to", "hub", "-o", tmp_path / "file") == 2
    assert "is there already" in capfd.readouterr().err


def test_a_target_from_outside(made: Path, tmp_path: Path):
    report = export_run(made, "toyexporters:vocabulary", tmp_path / "out")
    assert report.facts["max_tokens"] == 64 and (tmp_path / "out" / "tokenizer.json").exists()


def test_nothing_half_written_stays(made: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no space left"):
        export_run(made, "toyexporters:broken", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    export_run(made, "toyexporters:vocabulary", tmp_path / "empty")
    assert (tmp_path / "empty" / "tokenizer.json").exists()


def test_an_export_is_on_disk_before_it_has_its_name(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: set[str] = set()

    def record(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not (tmp_path / "out").exists():
            synced.add(path.name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    export_run(made, "toyexporters:vocabulary", tmp_path / "out")
    assert {"out", *(path.name for path in (tmp_path / "out").iterdir())} <= synced
