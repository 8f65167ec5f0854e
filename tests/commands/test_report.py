"""``clasp report``, ``clasp analyze`` and ``clasp maps`` on toy runs: files, streams, and one line for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from clasp import cli
from clasp.analysis.record import read_analyses
from clasp.commands.analyze import analyze_run
from clasp.commands.patch_maps import _texts, map_patches
from clasp.commands.report import run_labels, write_report
from clasp.config.recipe import recipe_from_dict
from clasp.types import Caption, Pair, UserError
from toydata import toys, write_csv
from toypairs import MemorySource
from toyruns import recipe, run, save_towers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one`` and ``two``, finished runs; ``pairs``."""
    folder = tmp_path_factory.mktemp("runs")
    towers, pairs = save_towers(folder / "towers"), write_csv(toys(48), folder / "pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(folder / "cache"))
        run(recipe(towers, pairs), folder / "one")
        run(recipe(towers, pairs, "train.lr=1e-3", 'tune.text=["norms"]'), folder / "two")
        (folder / "pairs.txt").write_text(str(pairs))
    return folder


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(folder / "cache"))
    monkeypatch.chdir(tmp_path)


def pairs_of(folder: Path) -> str:
    return (folder / "pairs.txt").read_text()


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["clasp", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def test_the_command_writes_one_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    assert command(monkeypatch, "report", folder / "one", folder / "two", "-o", "r.html") == 0
    streams = capfd.readouterr()
    assert streams.out == "" and streams.err.startswith("the report is in r.html (")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    for words in ("2 runs compared", "train.lr", "tune.text", "Training loss", "image to text", "peak memory"):
        assert words in text
    first = write_report([folder / "one", folder / "two"], tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == text and first == len(text.encode())


def test_labels_are_as_long_as_needed():
    assert run_labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert run_labels([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "b/y"]


def test_mistakes_of_a_report_are_one_line(folder: Path, tmp_path: Path):
    one, out = folder / "one", tmp_path / "r.html"
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.jsonl").write_text("")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    for runs, where, words in (
        ([tmp_path / "none"], out, "no run at .*no such folder"),
        ([tmp_path / "file"], out, "no run at .*it is a file"),
        ([tmp_path], out, "is not a run folder: it has no recipe.toml"),
        ([tmp_path / "sweep"], out, "it is a sweep, name runs inside it"),
        ([one, folder / "two" / ".." / "one"], out, "is named twice, first as"),
        ([one, one], out, "is named twice; a report has every run once"),
        ([one], tmp_path / "r.txt", "name it with .html, e.g. r.html"),
        ([one], tmp_path / "folder.html", "is a folder; name a file in it"),
        ([one], tmp_path / "none" / "r.html", "there is no folder"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            write_report(runs, where)
        assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission(folder: Path, tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="no permission"):
        write_report([folder / "one"], tmp_path / "locked" / "r.html")


# --- analyze ---------------------------------------------------------------------------------------------------------


def test_analyze_keeps_what_it_prints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    run = shutil.copytree(folder / "one", tmp_path / "one")
    words = ("analyze", run, f"data={pairs_of(folder)}", "neighbours=3")
    assert command(monkeypatch, *words, "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    kept = json.loads((run / "analysis.json").read_text())["analyses"]
    assert {"run": str(run), **kept[0]} == printed and len(kept) == 1
    assert printed["pairs"] == len({toy.caption for toy in toys(48)}), "one pair for each caption"
    geometry = printed["geometry"]
    assert geometry["pair_cosine"] > geometry["non_pair_cosine"] + 0.1, "the run learned the toy world"
    assert printed["margin"] == pytest.approx(
        printed["logit_scale"] * (geometry["pair_cosine"] - geometry["non_pair_cosine"])
    )
    blocks = {(row["image_block"], row["text_block"]) for row in printed["layers"]}
    assert blocks == {(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)}
    joint = printed["layers"][0]
    assert joint["mutual_knn"] > joint["mutual_knn_shuffled"]

    assert command(monkeypatch, *words) == 0
    table = capfd.readouterr().out
    for title in ("modality gap", "effective rank of images", "mutual k-NN", "embedding", "NMI of modality"):
        assert title in table
    assert len(json.loads((run / "analysis.json").read_text())["analyses"]) == 1
    write_report([run], tmp_path / "r.html")
    assert "Linear CKA of every image block" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_towers_that_share_layers_have_agreement_of_heads_and_gradients(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    net = {"width": 32, "heads": 2, "layers": 2}
    given = {
        "image": {"tower": "own:image", "net": {**net, "size": 32, "patch": 8}},
        "text": {"tower": "own:text", "vocabulary": "pairs", "net": {**net, "vocabulary": 300, "context": 16}},
        "share": {"attention": "shared", "ffn": "shared"},
        "tune": {"image": ["full"], "text": ["full"]},
        "head": {"width": 16, "bias": False},
        "data": {"train": pairs_of(folder), "val_fraction": 0.25},
        "train": {"batch_size": 12, "epochs": 1, "precision": "float32"},
    }
    run(recipe_from_dict(given, "shared"), tmp_path / "shared")
    assert command(monkeypatch, "analyze", "shared", f"data={pairs_of(folder)}", "neighbours=3") == 0
    printed = capfd.readouterr().out
    assert "4 attention heads" in printed and "cosine of the gradients" in printed
    (kept,) = read_analyses(tmp_path / "shared")
    assert [(row.layer, row.part) for row in kept.gradients] == [
        (layer, part) for layer in (0, 1) for part in ("all", "attention", "ffn")
    ]
    assert all(row.cosine is not None and row.cosine != row.cosine_shuffled for row in kept.gradients)
    write_report([tmp_path / "shared"], tmp_path / "r.html")
    assert "Gradients on shared weights" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_mistakes_of_an_analysis_are_found_before_compute(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clasp.commands.analyze.load", lambda run: pytest.fail("the model was loaded"))
    data = f"data={pairs_of(folder)}"
    for options, words in (
        ([], "analyze needs data="),
        ([data, "pair=3"], "did you mean pairs="),
        ([data, "pairs=0"], "pairs=0 must be a whole number from 1 to 2,000"),
        ([data, "neighbours=many"], "neighbours=many must be a whole number from 1 to 100"),
        ([data, "language=sw"], "no caption of .* is in sw"),
        ([data, "neighbours=100"], "needs more than neighbours=100"),
    ):
        with pytest.raises(UserError, match=words):
            analyze_run(folder / "one", options)


# --- maps ------------------------------------------------------------------------------------------------------------


def test_maps_are_drawn_and_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    run = shutil.copytree(folder / "one", tmp_path / "one")
    words = ("maps", run, f"data={pairs_of(folder)}")
    assert command(monkeypatch, *words, "pairs=2", "words=red, green", "--json") == 0
    found = json.loads(capfd.readouterr().out)["pairs"]
    assert len(found) == 2 and all(pair["texts"][1:] == ["red", "green"] for pair in found)
    for pair in found:
        cosines, attention = torch.tensor(pair["cosines"]), torch.tensor(pair["attention"])
        assert cosines.shape == (3, 4, 4) and cosines.abs().max() <= 1 and attention.shape == (4, 4)
    assert command(monkeypatch, *words, f"ids={found[0]['id']}") == 0
    assert "maps of 1 image in one/maps.png" in capfd.readouterr().err
    with Image.open(run / "maps.png") as sheet:
        assert sheet.height > 192
    assert not (run / "analysis.json").exists()
    write_report([run], tmp_path / "r.html")
    assert "one: maps.png" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_words_to_map_are_the_longest_that_have_letters():
    caption = "On 24,000 roofs – 1999 – (the) cat: snow, ice, 12:30!"
    pair = Pair("a", MemorySource("a.png", b""), (Caption(caption),), "a")
    assert _texts(pair, "", ()) == [caption, "roofs", "the", "cat", "snow", "ice"]
    assert _texts(pair, "", ("12",)) == [caption, "12"], "what is named is drawn"


def test_mistakes_of_maps_are_found_before_compute(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clasp.commands.patch_maps.load", lambda run: pytest.fail("the model was loaded"))
    data = f"data={pairs_of(folder)}"
    for options, message in (
        ([], "maps needs data="),
        ([data, "neighbours=3"], "'neighbours=3' is not an option; it takes data, pairs, ids, words"),
        ([data, "pairs=51"], "pairs=51 must be a whole number from 1 to 50"),
        ([data, "ids=none"], "has the id 'none'; ids: "),
        ([data, 'ids="a,b"'], "has the id 'a,b'; ids: "),
        ([data, "ids=a", "pairs=2"], "pairs=2 and ids=a: give one"),
        ([data, "ids=" + ",".join(map(str, range(51)))], "has 51 values; from 1 to 50 are wanted"),
        ([data, "words=red,,green"], "words=red,,green has 3 values; from 1 to 20 are wanted, .* none empty"),
        ([data, "words="], "words= is empty"),
        ([data, "words=red\ngreen"], "is not a list separated by commas"),
        ([data, "language=sw"], "no caption of .* is in sw"),
    ):
        with pytest.raises(UserError, match=message):
            map_patches(folder / "one", options)


def test_pairs_are_drawn_from_those_with_a_caption_in_the_language(folder: Path, tmp_path: Path):
    """One pair of twelve has a caption in the language; drawing from all would choose others."""
    run = shutil.copytree(folder / "one", tmp_path / "one")
    some = toys(12)
    (tmp_path / "images").mkdir()
    rows = []
    for number, toy in enumerate(some):
        (tmp_path / "images" / f"{toy.key}.png").write_bytes(toy.png)
        captions = {"en": toy.caption} | ({"sw": "red"} if number == 5 else {})
        rows.append(json.dumps({"id": toy.key, "image": f"images/{toy.key}.png", "caption": captions}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    data = f"data={tmp_path / 'pairs.jsonl'}"
    found = map_patches(run, [data, "language=sw", "pairs=1"])
    assert {id: maps.texts for id, maps in found.items()} == {some[5].key: ("red",)}
    with pytest.raises(UserError, match=f"maps: {some[4].key} has no caption in sw"):
        map_patches(run, [data, "language=sw", f"ids={some[4].key}"])
