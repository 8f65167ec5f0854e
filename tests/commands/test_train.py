"""The main job on the toy world: a run loads bitwise, repeats itself, stops and goes on, and says what it skips."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import clasp
from clasp import cli
from clasp.commands import train as main_job
from clasp.config import build, datasets
from clasp.config.build import build_model
from clasp.config.recipe import Recipe
from clasp.data.atomic_files import without_checksum
from clasp.data.loader import PairLoader
from clasp.models import precision
from clasp.models.precision import PrecisionChoice
from clasp.models.tower import Tower
from clasp.training.state import TrainState
from clasp.training.trackers import registry
from clasp.training.trackers.console import SilentReporter, TrainProgress
from clasp.types import UserError
from toydata import draw, toys, write_classes, write_csv, write_folder, write_images, write_tar
from toyruns import delta, lines, recipe, run, save_image_tower, save_text_tower, save_towers, spoil

TOYS = toys(64)
DESIGNED = {  # design, section 4
    "recipe.toml",
    "delta.safetensors",
    "base.json",
    "tokenizer",
    "transform.json",
    "log.jsonl",
    "results.jsonl",
    "cost.json",
    "README.md",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_csv(TOYS, tmp_path / "pairs")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every model that was assembled, as it is in memory."""
    made, assemble = [], main_job.build_model_and_preprocessing

    def watched(of: Recipe, *captions: Callable[[], list[str]]):
        made.append(assemble(of, *captions))
        return made[-1]

    monkeypatch.setattr(main_job, "build_model_and_preprocessing", watched)
    return made


WAYS = {
    "heads": ["head.noise=0.5", "head.dropout=0.3"],
    "closed form": ["head.init=cca", "head.ridge=[0.1, 0.1]", "head.noise=0.5", "data.captions=all"],
    "glu, sigmoid": ["head.kind=glu", "head.standardize=false", "loss.kind=sigmoid"],
    "learned pooling": ["image.pool=attention"],
    "learned pooling that is not trained": ["image.pool=attention", "head.standardize=false", "tune.head=none"],
    "low rank": ['tune.image=["lora(rank=2)"]', 'tune.text=["lora(rank=2)"]'],
    "adapters, norms": ['tune.image=["adapters(reduction=4)","norms"]', "tune.text=[\"adapters(init='random')\"]"],
    "everything": ['tune.image=["full"]', 'tune.text=["full"]', "data.augment.rotate=10", "train.lr_factors.tower=0.1"],
    "a whole CNN": [
        "image.tower=pip:efficientnet-lite0",
        "image.size=32",
        "image.pool=mean",
        'tune.image=["full"]',
        "train.epochs=1",
    ],
    "fewer patches": [
        "image.patch_dropout=0.5",
        "image.pool=cls+mean",
        "tune.image=[\"lora(rank=2, blocks='1:')\"]",
        "train.micro_batch=5",
    ],
    "dropout inside": ["image.dropout=true", 'tune.text=["deep(n=1)"]', "text.dropout=true"],
}


# --- a run and what it leaves behind ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_loads_bitwise_and_repeats_itself(way: str, towers: Path, pairs: Path, tmp_path: Path, models: list) -> None:
    made = recipe(towers, pairs, "train.epochs=2", "train.select=last").with_overrides(WAYS[way])
    done = run(made, tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == DESIGNED
    assert done.delta_bytes == (tmp_path / "one" / "delta.safetensors").stat().st_size

    loaded, model = clasp.load(tmp_path / "one"), models[0].model
    pixels, tokens = torch.randn(3, 3, 32, 32), models[0].tokenizer(["a red ring", "the photo of a circle"])
    with torch.no_grad():
        assert torch.equal(loaded.encoder.encode_image(pixels), model.encode_image(pixels))
        assert torch.equal(
            loaded.encoder.encode_text(tokens.ids, tokens.mask), model.encode_text(tokens.ids, tokens.mask)
        )
    assert loaded.fingerprint == clasp.EmbeddingModel(model, models[0].transform, models[0].tokenizer).fingerprint

    tensors = delta(tmp_path / "one")
    assert set(tensors) == model.selection == {n for n, p in model.named_parameters() if p.requires_grad}
    before = dict(build_model(made).named_parameters())
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    moved = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}
    assert len(moved) > 0.8 * len(tensors), sorted(set(tensors) - moved)

    run(made, tmp_path / "two")
    assert (tmp_path / "two" / "delta.safetensors").read_bytes() == (
        tmp_path / "one" / "delta.safetensors"
    ).read_bytes()
    if way == "heads":
        run(made.with_overrides(["train.seed=2"]), tmp_path / "three")
        assert not same(delta(tmp_path / "three"), tensors)


def test_the_folder_says_what_was_done(towers: Path, pairs: Path, tmp_path: Path) -> None:
    said = []
    made = recipe(towers, pairs, "train.batch_size=auto", "train.epochs=5")
    done = main_job.train_recipe(made, tmp_path / "run", say=said.append)
    settled = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert settled["train"]["batch_size"] == 8 and "batch 8 is the largest" in said[0]
    base = json.loads((tmp_path / "run" / "base.json").read_text())
    assert base["image"]["tower"] == f"file:{towers / 'image'}" and len(base["text"]["fingerprint"]) == 64
    results = lines(tmp_path / "run" / "results.jsonl")
    assert [row["task"] for row in results] == ["retrieval/image_to_text", "retrieval/text_to_image", "retrieval"]
    assert [row["metrics"] for row in results] == [row.metrics for row in done.results]
    log = lines(tmp_path / "run" / "log.jsonl")
    assert [row["event"] for row in log if row["event"] != "step"][::10] and log[-1]["event"] == "stop"
    card = (tmp_path / "run" / "README.md").read_text()
    for words in ("| model |", "R@5", f"{100 * done.results[-1].metrics['recall@5']:.1f}", "clasp.load(", "to its end"):
        assert words in card
    assert "nan" not in card


def test_the_card_says_which_step_the_weights_are_of(towers: Path, pairs: Path, tmp_path: Path) -> None:
    made = recipe(towers, pairs, "head.init=cca", "head.standardize=true", "train.lr=1e-12", "train.epochs=2")
    for select, said in (("best", True), ("last", False)):
        run = tmp_path / select
        main_job.train_recipe(made.with_overrides([f"train.select={select}"]), run, say=str)
        assert ("The weights are those of step 0, the best on validation." in (run / "README.md").read_text()) == said


def test_a_learned_pooling_is_part_of_the_delta_and_of_the_heads(towers: Path, pairs: Path, tmp_path: Path) -> None:
    run(recipe(towers, pairs, *WAYS["learned pooling"]), tmp_path / "run")
    assert "image.pooling.query" in delta(tmp_path / "run")


# --- what frozen towers say is computed once -------------------------------------------------------------------------


def test_frozen_towers_are_asked_once(
    towers: Path, pairs: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = counted(monkeypatch)
    run(recipe(towers, pairs, "train.epochs=5"), tmp_path / "one")
    captions = {toy.caption for toy in TOYS}
    # each image once, whatever the epochs; captions once in training and once in validation
    assert asked["image"] == len(TOYS) and len(captions) <= asked["text"] <= 2 * len(captions)
    files = {path: path.stat().st_mtime_ns for path in (cache / "features").iterdir()}
    asked.update(image=0, text=0)
    run(recipe(towers, pairs, "train.epochs=5", "head.init=cca"), tmp_path / "two")
    assert asked == {"image": 0, "text": 0}
    assert files == {path: path.stat().st_mtime_ns for path in (cache / "features").iterdir()}


@pytest.mark.parametrize("setting", ["data.feature_cache=off", "data.augment.flip=0.5", "image.dropout=true"])
def test_but_in_every_step_where_they_would_say_something_else(
    setting: str, towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = counted(monkeypatch)
    run(recipe(towers, pairs, "train.epochs=5", setting), tmp_path / "one")
    assert asked["image"] > 5 * 32


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Rows that went through each tower."""
    asked, pooled = {"image": 0, "text": 0}, Tower.pooled

    def watched(self: Tower, inputs):
        answer = pooled(self, inputs)
        asked[self.modality] += len(answer)
        return answer

    monkeypatch.setattr(Tower, "pooled", watched)
    return asked


# --- it learns -------------------------------------------------------------------------------------------------------

LONG = ("train.epochs=30", "train.lr=1e-2", "train.batch_size=64")


def test_heads_learn_the_toy_world_and_shuffled_captions_teach_nothing(towers: Path, tmp_path: Path) -> None:
    drawn = toys(360)
    true = run(recipe(towers, write_classes(drawn, tmp_path / "true"), *LONG), tmp_path / "one").results
    assert [row.task for row in true] == ["zeroshot"] and true[0].chance["top1"] == pytest.approx(1 / 30)
    assert true[0].metrics["top1"] > 0.3 and true[0].metrics["top5"] > 0.8, true[0].metrics
    shuffled = drawn.copy()
    random.Random(0).shuffle(shuffled)
    lies = [toy._replace(shape=other.shape, colour=other.colour) for toy, other in zip(drawn, shuffled, strict=True)]
    false = run(recipe(towers, write_classes(lies, tmp_path / "false"), *LONG), tmp_path / "two").results
    assert false[0].interval["top1"].low <= 1 / 30 and false[0].metrics["top1"] < 0.12, false[0].metrics
    assert false[0].interval["top5"].low <= 5 / 30


def test_retrieval_rises_from_chance(towers: Path, tmp_path: Path) -> None:
    pairs = write_csv(toys(160), tmp_path / "pairs")
    run(recipe(towers, pairs, *LONG, "train.evaluate_every=30"), tmp_path / "run")
    asked = [row["metrics"] for row in lines(tmp_path / "run" / "log.jsonl") if row["event"] == "evaluation"]
    assert asked[-1]["mean_recall"] > 2 * asked[0]["mean_recall"] and asked[-1]["recall@10"] > 0.5, asked


def test_class_folders_are_split_by_image_and_validated_by_class(towers: Path, tmp_path: Path) -> None:
    made = recipe(towers, write_classes(TOYS, tmp_path / "classes"))
    train, val = datasets.open_training_pairs(made)
    assert {p.meta["class"] for p in train} & {p.meta["class"] for p in val} and len(val) > 5
    done = run(made, tmp_path / "run")
    assert done.results[0].task == "zeroshot" and done.results[0].n == len(val)
    assert done.results[0].chance["top1"] == pytest.approx(1 / 30), "classes of training pairs count too"
    captioned = write_folder(TOYS, tmp_path / "folder")
    assert run(recipe(towers, captioned), tmp_path / "other").results[-1].task == "retrieval"


def test_captions_are_no_classes_beside_a_validation_set_of_classes(towers: Path, tmp_path: Path) -> None:
    """Training captions of any wording, validation photos in class folders: only these are classes."""
    some = [toy for toy in TOYS if toy.colour in ("red", "blue")]
    val = write_classes(some, tmp_path / "classes")
    done = run(recipe(towers, write_csv(TOYS, tmp_path / "pairs"), f"data.val={val}"), tmp_path / "run")
    assert done.results[0].task == "zeroshot" and done.results[0].n == len(some)
    assert done.results[0].chance["top1"] == pytest.approx(1 / len({(toy.colour, toy.shape) for toy in some}))


def test_a_single_class_is_refused(towers: Path, tmp_path: Path) -> None:
    one = [toy._replace(shape="ring", colour="red") for toy in TOYS]
    with pytest.raises(UserError, match=r"only one class|two classes"):
        run(recipe(towers, write_classes(one, tmp_path / "classes")), tmp_path / "run")


# --- it stops and goes on --------------------------------------------------------------------------------------------


class StopAt(SilentReporter):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, progress: TrainProgress) -> None:
        if progress.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "way, step",
    [
        ("heads", 1),
        ("closed form", 4),
        ("everything", 8),
        ("a whole CNN", 1),
        ("glu, sigmoid", 9),
        ("fewer patches", 4),
    ],
)
def test_resumed_equals_never_stopped(way: str, step: int, towers: Path, pairs: Path, tmp_path: Path) -> None:
    made = recipe(towers, pairs, *WAYS[way], "train.batch_size=14", f"train.select={'best' if step == 4 else 'last'}")
    whole = run(made, tmp_path / "whole")
    assert whole.fitted.position.step >= step
    folder = tmp_path / "stopped"
    stopped = main_job.train_recipe(made, folder, say=str, reporter=StopAt(step))
    assert stopped.fitted.interrupted and stopped.fitted.position.step == step and not stopped.results
    assert (folder / "state").is_dir() and "clasp resume" in (folder / "README.md").read_text()
    assert clasp.load(folder).encode_text(["a red ring"]).shape == (1, 16)
    with pytest.raises(UserError, match="clasp resume"):
        run(made, folder)
    done = run(written(folder), folder, resume=True)
    assert (folder / "delta.safetensors").read_bytes() == (tmp_path / "whole" / "delta.safetensors").read_bytes()
    assert [row.metrics for row in done.results] == [row.metrics for row in whole.results]
    assert {path.name for path in folder.iterdir()} == DESIGNED
    with pytest.raises(UserError, match="no state/ to resume from; it is finished"):
        run(written(folder), folder, resume=True)


def test_features_are_of_one_precision_before_and_after_an_interruption(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that a machine with bfloat16 started and another one resumes."""
    made, said = recipe(towers, pairs, "train.batch_size=14", "train.select=last", "train.precision=auto"), []
    with monkeypatch.context() as patch:
        patch.setattr(precision, "_detect", lambda kind: PrecisionChoice("bfloat16", "faster on the first machine"))
        run(made, tmp_path / "whole")
        main_job.train_recipe(made, tmp_path / "stopped", say=said.append, reporter=StopAt(4))
    assert sum("computed in bfloat16" in line and "faster on the first machine" in line for line in said) == 2
    run(written(tmp_path / "stopped"), tmp_path / "stopped", resume=True)
    assert same(delta(tmp_path / "stopped"), delta(tmp_path / "whole"))
    reasons = [row["reason"] for row in lines(tmp_path / "stopped" / "log.jsonl") if row["event"] == "start"]
    assert reasons == ["faster on the first machine", "as before the interruption"]
    run(made, tmp_path / "float32")
    assert not same(delta(tmp_path / "float32"), delta(tmp_path / "whole"))


@pytest.mark.parametrize("change", ["a caption", "a pair less", "another tower", "another recipe"])
def test_a_run_goes_on_with_what_it_was_started_with_only(change: str, pairs: Path, tmp_path: Path) -> None:
    towers = save_towers(tmp_path / "own")
    made, folder = recipe(towers, pairs), tmp_path / "run"
    main_job.train_recipe(made, folder, say=str, reporter=StopAt(2))
    again = written(folder)
    wanted = "the pairs of .* have changed"
    rows = pairs.read_text().splitlines()
    if change == "a caption":
        pairs.write_text("\n".join([*rows[:-1], rows[-1].replace(",a ", ",the ")]) + "\n")
    elif change == "a pair less":
        pairs.write_text("\n".join(rows[:-1]) + "\n")
    elif change == "another tower":
        spoil(towers / "text")
        wanted = "other weights of the text tower"
    else:
        again, wanted = again.with_overrides(["train.lr=0.5"]), "another recipe"
    with pytest.raises(UserError, match=wanted):
        run(again, folder, resume=True)


def test_a_state_saved_on_the_way_is_enough(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves no delta, only what was saved last."""
    made = recipe(towers, pairs, "head.noise=0.5", "train.save_every_minutes=1e-9")
    run(made, tmp_path / "whole")
    saved, save_state = [], main_job.RunFolder.save_state

    def cut(self: main_job.RunFolder, state: TrainState) -> None:
        save_state(self, state)
        saved.append(state.position.step)
        if len(saved) == 4:
            raise SystemExit("no power")

    with monkeypatch.context() as patch:
        patch.setattr(main_job.RunFolder, "save_state", cut)
        with pytest.raises(SystemExit):
            run(made, tmp_path / "cut")
    assert not (tmp_path / "cut" / "delta.safetensors").exists()
    with pytest.raises(UserError, match="clasp resume"):
        run(made, tmp_path / "cut")
    run(written(tmp_path / "cut"), tmp_path / "cut", resume=True)
    assert same(delta(tmp_path / "cut"), delta(tmp_path / "whole"))


def written(folder: Path) -> Recipe:
    return main_job.Recipe.model_validate(tomllib.loads((folder / "recipe.toml").read_text()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["image.patch_dropout=0.5"], "no block of file:.* trains, so that no step would be shorter"),
        (
            [
                "image.patch_dropout=0.5",
                "image.tower=pip:efficientnet-lite0",
                "image.pool=mean",
                'tune.image=["norms"]',
            ],
            "pip:efficientnet-lite0 .* computes on feature maps",
        ),
    ],
)
def test_patch_dropout_that_cannot_be_is_refused_before_any_compute(
    changes: list[str], words: str, towers: Path, pairs: Path, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(UserError, match=f"image.patch_dropout = 0.5: {words}"):
        run(recipe(towers, pairs, *changes), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not list(cache.glob("features/*.npy"))


# --- trackers --------------------------------------------------------------------------------------------------------


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of ``clasp`` followed by some words."""
    monkeypatch.setattr(sys, "argv", ["clasp", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_tracker_from_outside_gets_every_number(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(towers, pairs, "head.noise=0.5")
    (tmp_path / "toy.toml").write_text(made.to_toml())
    folder = tmp_path / "runs" / "one"
    named = 'train.trackers=["toytrackers:Diary"]'
    assert not typed(
        monkeypatch, "train", str(tmp_path / "toy.toml"), named, "--runs", str(folder.parent), "--name", "one"
    )
    (first, config, step), *logged, (last, results, _) = lines(folder / "diary.jsonl")
    assert (first, config, step) == ("config", tomllib.loads((folder / "recipe.toml").read_text()), 0)
    assert (last, results) == ("finish", list(map(without_checksum, lines(folder / "results.jsonl"))))
    said = [(metrics, step) for _, metrics, step in logged]
    assert [row["event"] for row in lines(folder / "log.jsonl")] == [
        m["event"] for m, _ in said if m["event"] != "cost"
    ]
    losses = [row["loss"] for row in lines(folder / "log.jsonl") if row["event"] == "step"]
    assert [metrics["train/loss"] for metrics, _ in said if "train/loss" in metrics] == losses
    asked = [row["metrics"] for row in lines(folder / "log.jsonl") if row["event"] == "evaluation"]
    assert [m["validation/recall@1"] for m, _ in said if "validation/recall@1" in m] == [m["recall@1"] for m in asked]
    assert all(not isinstance(value, dict | list) for metrics, _ in said for value in metrics.values())
    cost = json.loads((folder / "cost.json").read_text())["sum"]
    assert said[-1][0]["cost/delta_bytes"] == cost["delta_bytes"] and said[-1][1] == cost["steps"]
    run(made, tmp_path / "two")
    assert same(delta(folder), delta(tmp_path / "two")), "whatever a tracker draws"


def test_a_run_goes_on_with_other_trackers_and_nothing_else_changed(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made, folder = recipe(towers, pairs, 'train.trackers=["toytrackers:Unreachable"]'), tmp_path / "run"
    whole = run(made, tmp_path / "whole")
    assert whole.results, "a tracker that fails on the way ends nothing"
    main_job.train_recipe(made, folder, say=str, reporter=StopAt(4))
    assert lines(folder / "diary.jsonl")[-1][0] == "log" and (folder / "state").exists()
    assert typed(monkeypatch, "resume", str(folder), "train.lr=0.5", "--allow-code") == 2
    assert "was started with another recipe (train.lr = 0.5 (was 0.003))" in capfd.readouterr().err
    assert not typed(monkeypatch, "resume", str(folder), 'train.trackers=["toytrackers:Diary"]')
    diary = lines(folder / "diary.jsonl")
    assert [step for what, _, step in diary if what == "config"] == [0, 4] and diary[-1][0] == "finish"
    assert same(delta(folder), delta(tmp_path / "whole"))


@pytest.mark.parametrize(
    "name, words",
    [
        ("wandb", "pip install 'clasp-vl[wandb]'"),
        ("toytrackers:None", "has no class 'None'"),
        ("toytrackers:NeverThere", "cannot start"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_before_any_compute(
    name: str, words: str, towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda package: None)
    asked = counted(monkeypatch)
    with pytest.raises(UserError) as error:
        run(recipe(towers, pairs, f'train.trackers=["{name}"]'), tmp_path / "run")
    assert words in str(error.value) and "\n" not in str(error.value) and asked == {"image": 0, "text": 0}
    run(recipe(towers, pairs, "train.epochs=1"), tmp_path / "run")  # its name is not blocked


# --- names that are taken --------------------------------------------------------------------------------------------


def test_no_run_is_written_over(towers: Path, pairs: Path, tmp_path: Path) -> None:
    run(recipe(towers, pairs), tmp_path / "run")
    with pytest.raises(UserError, match="holds a run already; choose another name"):
        run(recipe(towers, pairs), tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        run(recipe(towers, pairs), tmp_path / "file")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"something other than a run \(README.md\)"):
        run(recipe(towers, pairs), tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["README.md"]


def test_a_run_that_failed_before_it_trained_does_not_block_its_name(towers: Path, tmp_path: Path) -> None:
    folder = write_folder(TOYS, tmp_path / "pairs")
    for toy in TOYS[:9]:
        (folder / f"{toy.key}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read"):
        run(recipe(towers, folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    write_folder(TOYS, tmp_path / "pairs")
    run(recipe(towers, folder), tmp_path / "run")
    log = lines(tmp_path / "run" / "log.jsonl")
    assert {path.name for path in (tmp_path / "run").iterdir()} == DESIGNED
    assert sum(row["event"] == "start" for row in log) == 1


# --- samples that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["auto", "off"])
def test_a_corrupt_sample_is_skipped_counted_and_named(features: str, towers: Path, tmp_path: Path) -> None:
    folder = write_folder(TOYS, tmp_path / "pairs")
    made = recipe(towers, folder, f"data.feature_cache={features}", "train.epochs=4", "train.batch_size=46")
    train, val = datasets.open_training_pairs(made)
    bad = [train[0].id, train[7].id, val[0].id]
    (folder / bad[0]).write_bytes((folder / bad[0]).read_bytes()[:60])
    (folder / bad[1]).write_bytes(b"no picture")
    (folder / bad[2]).unlink()
    (folder / bad[2]).symlink_to(folder / "gone")
    done = run(made, tmp_path / "run")
    named = [row for row in lines(tmp_path / "run" / "log.jsonl") if row["event"] == "skipped"]
    assert sorted(row["id"] for row in named) == sorted(bad), "each once, however many epochs"
    assert all(row["reason"] for row in named)
    assert {sample.id for sample in done.fitted.skipped} == set(bad[:2])
    assert done.results[0].n == len(val) - 1
    assert "unreadable: 2 samples" in (tmp_path / "run" / "README.md").read_text()
    assert [row["skipped"] for row in lines(tmp_path / "run" / "log.jsonl") if row["event"] == "step"][-1] == 2


@pytest.mark.parametrize("features", ["auto", "off"])
@pytest.mark.parametrize("where", ["train", "val"])
def test_past_the_share_a_run_stops_with_the_list(features: str, where: str, towers: Path, tmp_path: Path) -> None:
    folder = write_folder(TOYS, tmp_path / "pairs")
    made = recipe(towers, folder, f"data.feature_cache={features}", "train.batch_size=16", "data.val_fraction=0.4")
    some = datasets.open_training_pairs(made)[where == "val"]
    for pair in some[:4]:
        (folder / pair.id).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"4 of \d+ images cannot be read") as error:
        run(made, tmp_path / "run")
    assert all(pair.id in str(error.value) for pair in some[:4]) and "\n" not in str(error.value)


def test_the_count_goes_on_after_a_stop(towers: Path, tmp_path: Path) -> None:
    """Three of one run may be bad; two before a stop and two after are too many."""
    folder = write_folder(TOYS, tmp_path / "pairs")
    made = recipe(towers, folder, "data.feature_cache=off", "head.standardize=false", "train.batch_size=4")
    epoch = [id for batch in first_epoch(made) for id in batch]
    for name in (*epoch[:2], *epoch[-3:-1]):
        (folder / name).write_bytes(b"no picture")
    main_job.train_recipe(made, tmp_path / "run", say=str, reporter=StopAt(2))
    with pytest.raises(UserError, match="4 of") as error:
        run(written(tmp_path / "run"), tmp_path / "run", resume=True)
    assert all(name in str(error.value) for name in (*epoch[:2], *epoch[-3:-1]))


def first_epoch(made: Recipe) -> list[tuple[str, ...]]:
    """The ids of the batches of a recipe's first epoch."""
    train, _ = datasets.open_training_pairs(made)
    inputs = build.build_feature_source(main_job.build_model_and_preprocessing(made), made)
    listing = main_job.PairIndex(train)
    sides = inputs.batch_reader(train, listing, None)
    batches = PairLoader(sides, batch_size=made.train.batch_size, seed=made.train.seed)
    return [batch.ids for batch in batches.epoch(0)]


# --- other data, other towers ----------------------------------------------------------------------------------------


def test_languages_choose_captions_and_are_reported(towers: Path, tmp_path: Path) -> None:
    write_images(TOYS, tmp_path)
    rows = [
        {"image": f"images/{t.key}.png", "caption": {"en": t.caption, "sw": f"nyekundu {t.shape}"} | extra}
        for t, extra in zip(TOYS, [{"de": "rot"}, *[{}] * (len(TOYS) - 1)], strict=True)
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(recipe(towers, source, "data.languages=['en','sw']"), tmp_path / "run")
    both = {row.language: row for row in done.results if row.task == "multilingual"}
    assert set(both) == {"en", "sw", "macro:all"}
    mean = (both["en"].metrics["recall@5"] + both["sw"].metrics["recall@5"]) / 2
    assert both["macro:all"].metrics["recall@5"] == pytest.approx(mean)
    assert "| sw |" in (tmp_path / "run" / "README.md").read_text()
    one = run(recipe(towers, source, "data.languages=['sw']"), tmp_path / "sw")
    assert {row.task.partition("/")[0] for row in one.results} == {"retrieval"}
    train, val = datasets.open_all_pairs(recipe(towers, source, "data.languages=['de']", f"data.val={source}"))
    assert len(train) == len(val) == 1
    with pytest.raises(
        UserError, match=r"zero pairs: no caption of .*pairs.jsonl is in zu.* captions are in de, en, sw"
    ):
        run(recipe(towers, source, "data.languages=['zu']"), tmp_path / "zu")


def test_captions_without_a_language_are_told_apart_from_other_languages(
    towers: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="languages it does not name"):
        run(recipe(towers, pairs, "data.languages=['en']"), tmp_path / "run")


def test_every_caption_is_a_sample_of_its_own(towers: Path, tmp_path: Path) -> None:
    write_images(TOYS, tmp_path)
    rows = [{"image": f"images/{t.key}.png", "caption": [t.caption, t.shape, t.colour]} for t in TOYS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipe(towers, tmp_path / "pairs.jsonl", "data.captions=all", "train.batch_size=16", "head.init=cca")
    done = run(made, tmp_path / "run")
    train, _ = datasets.open_training_pairs(made)
    assert done.fitted.position.step == 3 * (3 * len(train) // 16)


def test_a_convnext_on_a_tar_and_a_validation_set_of_its_own(towers: Path, tmp_path: Path) -> None:
    tower = save_image_tower(tmp_path / "convnext", "convnext")
    train, val = write_tar(TOYS[:48], tmp_path / "train.tar"), write_csv(TOYS[48:], tmp_path / "val")
    made = recipe(towers, train, f"data.val={val}", f"image.tower=file:{tower}", 'tune.image=["norms"]')
    done = run(made, tmp_path / "run")
    assert done.results[0].n == 16
    assert clasp.load(tmp_path / "run").encode_image([draw("ring", "red")]).shape == (1, 16)


def test_the_same_bytes_of_a_picture_give_the_same_vector(towers: Path, pairs: Path, tmp_path: Path) -> None:
    run(recipe(towers, pairs), tmp_path / "run")
    model = clasp.load(tmp_path / "run")
    path = tmp_path / "pairs" / "images" / f"{TOYS[0].key}.png"
    with Image.open(path) as picture:
        ways = model.encode_image([str(path), path, TOYS[0].png, picture])
    with Image.open(path) as opened:
        assert torch.equal(model.encode_image([opened] * 4), ways)
    assert all(torch.equal(row, ways[0]) for row in ways) and ways.norm(dim=1).allclose(torch.ones(4))
    texts = ["a red ring", "a photo of the blue circle", "ring"]
    torch.testing.assert_close(model.encode_text(texts)[1:2], model.encode_text(texts[1:2]), rtol=0, atol=1e-6)
    assert model.similarity(ways, model.encode_text(texts)).shape == (4, 3)
    for wrong in (tmp_path / "none.png", str(tmp_path / "none.png"), b"no picture"):
        with pytest.raises(UserError, match=r"none.png|image 1"):
            model.encode_image([path, wrong])
    with pytest.raises(UserError, match="a list of strings"):
        model.encode_text("a red ring")


def test_a_run_refuses_other_base_weights(pairs: Path, tmp_path: Path) -> None:
    towers = tmp_path / "towers"
    save_image_tower(towers / "image")
    save_text_tower(towers / "text")
    run(recipe(towers, pairs, 'tune.text=["adapters"]'), tmp_path / "run")
    clasp.load(tmp_path / "run")
    spoil(towers / "image")
    with pytest.raises(
        UserError, match=r"other weights of the image tower file:.*layernorm.weight is \w+, was \w+"
    ) as error:
        clasp.load(tmp_path / "run")
    assert "1 of " in str(error.value) and "\n" not in str(error.value)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
