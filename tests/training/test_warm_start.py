"""Runs without a step, and runs that start from another: exactly where it ended, or one line that says why not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from clasp.config.build import load
from clasp.types import UserError
from toyruns import delta, lines, recipe, run

PHRASES = ["a red circle", "a photo of a blue square"]


@pytest.fixture(scope="module")
def start(towers: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in closed form, without a step."""
    folder = tmp_path_factory.mktemp("runs") / "start"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(folder.parent / "cache"))
        run(recipe(towers, pairs, "train.epochs=0", "head.init=cca"), folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))


def test_no_epochs_are_the_initial_weights_evaluated_and_saved(towers: Path, pairs: Path, start: Path, tmp_path: Path):
    stepped = run(recipe(towers, pairs, "train.epochs=1", "head.init=cca"), tmp_path / "stepped")
    log = lines(start / "log.jsonl")
    assert not [row for row in log if row["event"] == "step"]
    (evaluated,) = [row for row in log if row["event"] == "evaluation"]
    first = next(row for row in lines(tmp_path / "stepped" / "log.jsonl") if row["event"] == "evaluation")
    assert evaluated["metrics"] == first["metrics"] and evaluated["metrics"]["mean_recall"] > 0.4
    assert stepped.fitted.position.step > 0 and lines(start / "results.jsonl") and not (start / "state").exists()
    assert (start / "README.md").exists() and (start / "cost.json").exists()
    assert load(start).encode_text(PHRASES).shape == (2, 16)


@pytest.mark.parametrize(
    "tuned",
    [
        ['tune.image=["lora(rank=2)","norms"]', 'tune.text=["lora(rank=2)"]'],
        ['tune.image=["adapters(reduction=4)"]', 'tune.text=["dora(rank=2)"]'],
        ['tune.image=["full"]', 'tune.text=["biases"]'],
        ["head.init=cca", "head.ridge=[3.0,3.0]"],
    ],
    ids=["low rank and norms", "adapters", "full", "heads again"],
)
def test_a_run_starts_exactly_where_another_ended(
    tuned: list[str], towers: Path, pairs: Path, start: Path, tmp_path: Path
):
    run(recipe(towers, pairs, "train.epochs=0", f"train.init_from={start}", *tuned), tmp_path / "next")
    before, after = load(start), load(tmp_path / "next")
    assert torch.equal(before.encode_text(PHRASES), after.encode_text(PHRASES))
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before.encoder.encode_image(pixels), after.encoder.encode_image(pixels))
    assert delta(start).keys() <= delta(tmp_path / "next").keys()


def test_it_trains_from_there_and_needs_the_other_run_no_more(towers: Path, pairs: Path, start: Path, tmp_path: Path):
    copied = shutil.copytree(start, tmp_path / "copied")
    tuned = [f"train.init_from={copied}", 'tune.text=["lora(rank=2)"]', "train.select=last", "train.epochs=1"]
    run(recipe(towers, pairs, *tuned), tmp_path / "next")
    shutil.rmtree(copied)
    before, after = delta(start), delta(tmp_path / "next")
    assert not torch.equal(before["image_head.map.weight"], after["image_head.map.weight"])
    assert (before["image_head.map.weight"] - after["image_head.map.weight"]).abs().max() < 0.1
    load(tmp_path / "next")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["head.width=8"], r"image_head.map.bias of shape \(16,\), here \(8,\); head.width = 16 there, 8 here"),
        (["image.extra_layers=all"], r"its image tower; image.extra_layers = \[\] there, 'all' here"),
        (
            ["tune.head=none", "head.standardize=false", 'tune.image=["norms"]'],
            r"head.\w+.\w+, which does not train here",
        ),
        (["text.pool=cls"], "the base weights or the pooling of its text tower; text.pool = None there, 'cls' here"),
        (["image.layer=1"], r"the base weights or the pooling of its image tower; image.layer = None there, 1 here"),
    ],
)
def test_a_run_that_does_not_fit(other: list[str], said: str, towers: Path, pairs: Path, start: Path, tmp_path: Path):
    with pytest.raises(UserError, match=f"train.init_from = .*start' does not fit: .*{said}") as refused:
        run(recipe(towers, pairs, f"train.init_from={start}", *other), tmp_path / "next")
    assert "\n" not in str(refused.value)


def test_a_start_that_is_no_run(towers: Path, pairs: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no run at .*nowhere: no such folder"):
        run(recipe(towers, pairs, f"train.init_from={tmp_path / 'nowhere'}"), tmp_path / "next")


def test_towers_of_a_run_with_heads_of_other_layers(towers: Path, pairs: Path, start: Path, tmp_path: Path):
    tune = ['tune.image=["lora(rank=2)"]', 'tune.text=["norms"]']
    run(recipe(towers, pairs, f"train.init_from={start}", "train.epochs=1", "train.select=last", *tune), tmp_path / "t")
    again = ["train.init_parts=towers", "train.epochs=0", "head.init=cca", "head.width=8", "image.extra_layers=all"]
    run(recipe(towers, pairs, f"train.init_from={tmp_path / 't'}", *tune, *again), tmp_path / "again")
    tuned, made = delta(tmp_path / "t"), delta(tmp_path / "again")
    of_towers = [name for name in tuned if name.startswith(("image.", "text."))]
    assert of_towers and all(torch.equal(tuned[name], made[name]) for name in of_towers)
    assert made["image_head.map.weight"].shape[0] == 8 and made["image_head.map.weight"].abs().max() > 0
    with pytest.raises(UserError, match=r"does not fit: image\.\S+, which does not train here"):
        run(recipe(towers, pairs, f"train.init_from={tmp_path / 't'}", *again), tmp_path / "other")
    with pytest.raises(UserError, match=r"init_parts = 'towers' is of the run that init_from names"):
        recipe(towers, pairs, "train.init_parts=towers")
