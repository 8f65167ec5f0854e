"""A run as a repository of the hub: complete, loaded back bitwise, without paths of this machine, and its upload."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import clasp
from clasp.commands.export import export_run
from clasp.convert.exporters.job import ExportOptions
from clasp.types import UserError
from toydata import toys, write_folder
from toyruns import recipe, run, save_towers


@pytest.fixture
def made(tmp_path: Path) -> Path:
    here = tmp_path / "here"
    here.mkdir()
    towers = save_towers(here)
    changes = ('tune.image=["lora(rank=2)"]', 'tune.text=["adapters(reduction=4)"]', "train.epochs=1")
    run(recipe(towers, write_folder(toys(40), here / "pairs"), *changes), here / "run")
    return here / "run"


def test_it_loads_elsewhere_bitwise(made: Path, tmp_path: Path):
    out, model = tmp_path / "out", clasp.load(made)
    report = export_run(made, "hub", out)
    texts = ["a red circle", "blue ring"]
    wanted = model.encode_text(texts)
    shutil.rmtree(made.parent)
    loaded = clasp.load(shutil.move(out, tmp_path / "moved"))
    assert torch.equal(loaded.encode_text(texts), wanted) and loaded.fingerprint == model.fingerprint
    assert report.facts["bytes"] > 0
    for file in (tmp_path / "moved").rglob("*"):
        if file.suffix in (".toml", ".json", ".md"):
            assert str(tmp_path) not in file.read_text(encoding="utf-8"), file


def test_the_card_has_the_metadata_of_the_hub(made: Path, tmp_path: Path):
    export_run(made, "hub", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    head = card.split("---\n")[1]
    assert 'library_name: "clasp"' in head and '- "clasp"' in head and 'license: "other"' in head
    assert 'clasp.load("hf:USER/run")' in card and "licences of both base models" in card
    assert "| R@1 |" in card or "R@1" in card


def test_it_loads_from_the_hub_by_name(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export_run(made, "hub", tmp_path / "out")
    asked: list[str] = []

    def download(name: str) -> str:
        asked.append(name)
        return str(tmp_path / "out")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert clasp.load("hf:me/mine").fingerprint == clasp.load(made).fingerprint
    assert asked == ["me/mine"]
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"run 'hf:me/mine' cannot be downloaded"):
        clasp.load("hf:me/mine")


def test_an_upload_needs_a_token_and_a_network(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="--push needs a token"):
        export_run(made, "hub", tmp_path / "out", ExportOptions(push="me/mine"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--push me/mine: the hub cannot be reached") as error:
        export_run(made, "hub", tmp_path / "out", ExportOptions(push="me/mine"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_is_uploaded_is_the_folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, list[str]]] = []

    class Api:
        """Records what would be sent."""

        def create_repo(self, name: str, exist_ok: bool) -> str:
            return f"https://hub.example/{name}"

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, sorted(entry.name for entry in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    report = export_run(made, "hub", tmp_path / "out", ExportOptions(push="me/mine"))
    [(name, files)] = calls
    assert name == "me/mine" and "delta.safetensors" in files and "README.md" in files
    assert report.facts["address"] == "https://hub.example/me/mine"
    assert json.loads((tmp_path / "out" / "base.json").read_text())["image"]["tower"] == "file:{run}/towers/image"
