"""``clasp eval MODEL``: models that are no run, against embeddings by ``transformers``; and where results go."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub.errors import RemoteEntryNotFoundError

from clasp import cli
from clasp.commands.compare import compare_models
from clasp.commands.evaluate import evaluate_run
from clasp.commands.evaluated_model import find_model
from clasp.commands.training_overlap import training_overlap
from clasp.config.build import build_model_and_preprocessing
from clasp.config.pretrained import pretrained_recipe
from clasp.data.pairs import open_pairs
from clasp.evaluation.results import EvaluationResult
from clasp.models.frozen import FrozenTower
from clasp.types import Pixels, PooledFeatures, UserError, no_progress_bar
from toydata import toys, write_images
from toyruns import lines, recipe, run, save_towers
from toysavedtowers import save

TOYS = toys(30)
CLASSES = "w3 w4 w5 w6 w7 w8".split()


@dataclass
class World:
    """A CLIP and a SigLIP as folders, and pairs whose captions have words of their tokenizer and of the toy runs'."""

    folder: Path
    pairs: Path

    def saved(self, name: str) -> Path:
        place = self.folder / name
        return place if place.exists() else save(name, place)

    def embeddings(self, name: str) -> Path:
        """What ``transformers`` makes of the pairs, as arrays; prompts of the classes too."""
        place = self.folder / f"{name}-embeddings"
        if not place.exists():
            place.mkdir()
            write_embeddings(self.saved(name), place, self.pairs)
        return place


def write_embeddings(clip: Path, place: Path, pairs: Path) -> None:
    there = open_pairs(pairs)
    whole = hf.AutoModel.from_pretrained(clip).eval()
    texts = sorted({caption.text for pair in there for caption in pair.captions} | {f"a {name}" for name in CLASSES})
    transform = build_model_and_preprocessing(pretrained_recipe(f"clip:{clip}")).transform
    with torch.no_grad():
        pixels = torch.stack([transform(pair.image.read()) for pair in there])
        images = whole.get_image_features(pixel_values=pixels).pooler_output
        tokenizer = hf.AutoTokenizer.from_pretrained(clip)
        rows = []
        for text in texts:
            more = {"padding": "max_length", "max_length": 64} if whole.config.model_type == "siglip" else {}
            ids = tokenizer([text], return_tensors="pt", **more)["input_ids"]
            rows.append(whole.get_text_features(input_ids=ids).pooler_output[0])
    for side, vectors, names in (("image", images, [pair.id for pair in there]), ("text", torch.stack(rows), texts)):
        order = list(reversed(range(len(names))))  # rows are found by name
        np.save(place / f"{side}.npy", vectors.numpy()[order])
        (place / f"{side}.json").write_text(json.dumps([names[row] for row in order]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("models")
    write_images(TOYS, folder)
    rows = [
        {"image": f"images/{toy.key}.png", "caption": f"w{10 + n} w{20 + n // 2} {toy.colour}", "class": CLASSES[n % 6]}
        for n, toy in enumerate(TOYS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(folder / "cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield World(folder, folder / "pairs.jsonl")


def numbers(results: list[EvaluationResult]) -> dict[str, float]:
    return {f"{row.task}/{name}": value for row in results for name, value in row.metrics.items()}


TASKS = {"retrieval": [], "zeroshot": ["templates=a {}"]}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_dual_encoder_of_transformers_and_its_embeddings_have_one_result(
    name: str, task: str, world: World, tmp_path: Path
):
    options = [f"data={world.pairs}", *TASKS[task]]
    ours = evaluate_run(f"clip:{world.saved(name)}", task, options, out=tmp_path / "ours")
    theirs = evaluate_run(world.embeddings(name), task, options, out=tmp_path / "theirs")
    assert numbers(ours) == pytest.approx(numbers(theirs), abs=1e-6)
    assert len({round(value, 3) for value in numbers(ours).values()}) > 1, "an embedding that tells nothing apart"
    for place, model in (
        (tmp_path / "ours", f"clip:{world.saved(name)}"),
        (tmp_path / "theirs", world.embeddings(name)),
    ):
        assert len(lines(place / "results.jsonl")) == len(ours)
        assert json.loads((place / "model.json").read_text())["model"] == str(model)
    assert not (world.saved(name) / "results.jsonl").exists()


def test_an_image_is_encoded_once_whatever_is_asked_about_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Other tasks, folds and halves of the same pairs: a frozen tower runs over each image once."""
    encoded, run_tower = list[int](), FrozenTower.__call__

    def counting(self: FrozenTower, inputs: Any) -> PooledFeatures:
        encoded.append(len(inputs.values) if isinstance(inputs, Pixels) else 0)
        return run_tower(self, inputs)

    monkeypatch.setattr(FrozenTower, "__call__", counting)
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    asked = [("retrieval", []), ("retrieval", ["folds=2"]), ("zeroshot", []), ("knn", ["k=3"]), ("probe", [])]
    for task, options in asked:
        evaluate_run(f"clip:{world.saved('clip')}", task, [f"data={world.pairs}", *options], out=tmp_path / "out")
    assert sum(encoded) == len(TOYS)


def test_a_folder_is_recognised_by_its_files(world: World, tmp_path: Path):
    clip = world.saved("clip")
    shutil.copytree(clip, tmp_path / "st" / "0_CLIPModel")
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (tmp_path / "st" / "modules.json").write_text(json.dumps([module]))
    prints = {
        find_model(model).load(no_progress_bar).encoder.fingerprint
        for model in (clip, f"clip:{clip}", tmp_path / "st", str(tmp_path / "st"))
    }
    assert len(prints) == 1
    assert find_model(clip).run is None and find_model(clip).name == str(clip)
    (tmp_path / "st" / "modules.json").write_text(json.dumps([{**module, "path": "elsewhere"}]))
    with pytest.raises(UserError, match="is a SentenceTransformer of CLIPModel, not a CLIP with both encoders"):
        find_model(tmp_path / "st")
    (tmp_path / "open").mkdir()
    with pytest.raises(UserError, match=r"open is not a model to evaluate: it has none of recipe\.toml, image\.npy"):
        find_model(tmp_path / "open")


def test_results_go_where_the_user_says_and_to_no_other_folder(world: World, tmp_path: Path):
    model, options = f"clip:{world.saved('clip')}", [f"data={world.pairs}"]
    says = lambda words, **out: pytest.raises(UserError, match=words)  # noqa: E731
    with says("is not a run folder: name a folder for its results with --out"):
        evaluate_run(model, "retrieval", options)
    with says("holds something other than results; name a new folder"):
        evaluate_run(model, "retrieval", options, out=world.folder)
    place = tmp_path / "deep" / "results"
    for _ in range(2):
        evaluate_run(world.embeddings("clip"), "retrieval", options, out=place)
    assert len(lines(place / "results.jsonl")) == 6
    with says("holds the results of .*, and this is clip:"):
        evaluate_run(model, "retrieval", options, out=place)
    other = shutil.copytree(world.embeddings("clip"), tmp_path / "other")
    (place / "model.json").write_text(json.dumps({"model": str(other), "fingerprint": "another"}))
    with says("with other weights; name another folder"):
        evaluate_run(other, "retrieval", options, out=place)
    with says("retention evaluates the towers of a run folder, and clip:"):
        evaluate_run(model, "retention", options, out=place)
    assert len(lines(place / "results.jsonl")) == 6


def test_the_results_of_a_run_may_go_elsewhere_too(world: World, tmp_path: Path):
    at = tmp_path / "run"
    run(recipe(save_towers(world.folder / "towers"), world.pairs, "train.epochs=1"), at)
    before = (at / "results.jsonl").read_bytes()
    rows = evaluate_run(at, "retrieval", [f"data={world.pairs}"], out=tmp_path / "out")
    assert (at / "results.jsonl").read_bytes() == before and len(lines(tmp_path / "out" / "results.jsonl")) == 3
    assert numbers(evaluate_run(at, "retrieval", [f"data={world.pairs}"], out=at)) == numbers(rows)
    assert len(lines(at / "results.jsonl")) == before.count(b"\n") + 3 and not (at / "model.json").exists()


# --- two models ------------------------------------------------------------------------------------------------------


def test_pairs_that_were_trained_on_are_told(world: World, tmp_path: Path):
    at, said = tmp_path / "run", list[str]()
    done = run(recipe(save_towers(world.folder / "towers"), world.pairs, "train.epochs=1"), at)
    evaluate_run(at, "retrieval", [f"data={world.pairs}"], out=tmp_path / "out", say=said.append)
    (line,) = [each for each in said if each.startswith("warning")]
    trained = len(TOYS) - done.results[0].n
    assert f"warning: {trained} of {len(TOYS)} pairs to evaluate are training pairs of {at}" in line
    compare_models((at, world.embeddings("clip")), "retrieval", [f"data={world.pairs}"], say=said.append)
    assert said.count(line) == 2
    write_images(TOYS, tmp_path / "copy")  # other files of the same names
    captions = world.pairs.read_text()
    (tmp_path / "copy" / world.pairs.name).write_text(captions)
    evaluate_run(
        at, "retrieval", [f"data={tmp_path / 'copy' / world.pairs.name}"], out=tmp_path / "out", say=said.append
    )
    assert said.count(line) == 2 and not [each for each in said if each.startswith("warning") and each != line]


def test_many_training_pairs_are_read_from_their_index_or_not_at_all(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    at = tmp_path / "run"
    run(recipe(save_towers(world.folder / "towers"), world.pairs, "train.epochs=1"), at)
    pairs = open_pairs(world.pairs)
    (warning,) = training_overlap(at, "mine", {"": pairs})
    with monkeypatch.context() as patched:  # the table of training pairs is changed in the meantime
        patched.setattr("clasp.commands.training_overlap._compare", Mock(side_effect=UserError("changed")))
        assert training_overlap(at, "mine", {"": pairs}) == []
    monkeypatch.setattr("clasp.commands.training_overlap._INDEXED_BYTES", 10)
    assert training_overlap(at, "mine", {"": pairs}) == [warning]
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "another machine"))
    (line,) = training_overlap(at, "mine", {"": pairs})
    assert line == f"not checked whether mine was trained on pairs to evaluate: {world.pairs} has no index here"


def test_every_prediction_of_two_models_is_kept(world: World, tmp_path: Path):
    models = world.embeddings("siglip"), world.embeddings("clip")
    options = [f"data={world.pairs}", "templates=a {}"]
    done = compare_models(models, "zeroshot", options, out=tmp_path / "out")
    assert (done.first, done.second) == tuple(map(str, models))
    (alone,) = evaluate_run(models[1], "zeroshot", options, out=tmp_path / "alone")
    assert {each.metric: each.second for each in done.comparisons} == pytest.approx(alone.metrics)
    assert done.primary.metric == "top1" and done.primary.test == "mcnemar"
    rows = lines(tmp_path / "out" / "predictions.jsonl")
    assert len(rows) == len(TOYS) == done.primary.n
    first, second = (sum(row["top1"][side] for row in rows) / len(rows) for side in (0, 1))
    assert (first, second) == pytest.approx((done.primary.first, done.primary.second))
    for row in rows:
        assert row["expected"] in CLASSES and set(row["predicted"]) <= set(CLASSES)
        assert row["top1"] == [float(name == row["expected"]) for name in row["predicted"]]
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert kept == json.loads(json.dumps(done.to_dict()))


def test_a_run_compared_with_another_model(world: World, tmp_path: Path):
    at, options = tmp_path / "run", [f"data={world.pairs}"]
    run(recipe(save_towers(world.folder / "towers"), world.pairs, "train.epochs=1"), at)
    before = sorted(path.name for path in at.rglob("*"))
    done = compare_models((at, world.embeddings("clip")), "retrieval", options)
    assert done.first == str(at) and done.primary.metric == "mean_recall" and done.primary.test == "bootstrap"
    assert sorted(path.name for path in at.rglob("*")) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="out exists already; name a new folder"):
        compare_models((at, world.embeddings("clip")), "retrieval", options, out=tmp_path / "out")
    with pytest.raises(UserError, match="retention has no scores of single queries to compare; tasks: zeroshot, retr"):
        compare_models((at, world.embeddings("clip")), "retention", options)
    with pytest.raises(UserError, match="run is named twice; name another model"):
        compare_models((at, str(at)), "retrieval", options)


def test_the_comparison_on_the_command_line(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    words = ["compare", str(world.embeddings("clip")), str(world.embeddings("siglip")), "retrieval"]
    monkeypatch.setattr(sys, "argv", ["clasp", *words, f"data={world.pairs}"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capfd.readouterr().out
    assert not end.value.code and "image to text: R@1" in shown and "difference" in shown
    assert "no difference shown in mean recall: " in shown or " points of mean recall (" in shown


def test_robustness_has_a_row_for_each_corruption(world: World, tmp_path: Path):
    model, options = f"clip:{world.saved('clip')}", [f"data={world.pairs}", "templates=a {}"]
    named = ["corruptions=contrast,gaussian_noise", "severities=1,5"]
    rows = evaluate_run(model, "robustness", [*options, *named], out=tmp_path / "out")
    assert [row.task.partition("/")[2] for row in rows] == ["clean", "contrast", "gaussian_noise", "mean"]
    (clean,) = evaluate_run(model, "zeroshot", options, out=tmp_path / "out")
    assert rows[0].metrics == pytest.approx(clean.metrics) and rows[0].interval == clean.interval
    mean = {name: (rows[1].metrics[name] + rows[2].metrics[name]) / 2 for name in rows[1].metrics}
    assert rows[3].metrics == pytest.approx(mean) and rows[1].n == 2 * len(TOYS)
    for wrong, words in {
        "corruptions=contrst": "'contrst' is not one; .* did you mean contrast",
        "corruptions=fog": "there are gaussian_noise, shot_noise, .* contrast, pixelate, jpeg_compression$",
        "severities=0,1": "severities=0,1 must be numbers from 1 to 5",
        "corruptions=contrast,contrast": "names one twice",
    }.items():
        with pytest.raises(UserError, match=words):
            evaluate_run(model, "robustness", [*options, wrong], out=tmp_path / "out")
    with pytest.raises(UserError, match=r"robustness corrupts the images, and .* has their embeddings only"):
        evaluate_run(world.embeddings("clip"), "robustness", options, out=tmp_path / "stored")


def test_a_repository_of_the_hub_is_a_run_or_another_model(world: World, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"model 'hf:me/mine' cannot be read from the hub .*, and clip:me/mine opens"):
        find_model("hf:me/mine")

    def no_such_file(*_: object) -> str:
        raise RemoteEntryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_such_file)
    folder = world.saved("clip")
    source = find_model(f"hf:{folder}")
    assert source.run is None and source.name == f"hf:{folder}"
    direct = find_model(f"clip:{folder}").load(no_progress_bar)
    assert source.load(no_progress_bar).encoder.fingerprint == direct.encoder.fingerprint
