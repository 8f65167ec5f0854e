"""Trackers: names are checked, one that fails loses nothing, and what services get is read back, if installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clasp.config.recipe import read_recipe
from clasp.data.atomic_files import has_its_checksum, without_checksum
from clasp.training.trackers import registry
from clasp.training.trackers.accelerate_trackers import flatten_recipe, flatten_results
from clasp.training.trackers.group import TrackerGroup
from clasp.training.trackers.jsonl import JsonLinesTracker
from clasp.training.trackers.registry import TRACKERS, check_tracker_names, find_trackers, open_trackers
from clasp.types import SkippedSample, TrackedRun, Tracker, UserError

RESULTS = [
    {
        "task": "retrieval",
        "data": "validation",
        "language": "",
        "metrics": {"recall@1": 0.5, "median_rank": 2.0},
        "chance": {"recall@1": 0.1},
        "n": 10,
        "interval": {"recall@1": [0.4, 0.6]},
        "seconds": 0.25,
    }
]


def refused(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def opened(folder: Path, *names: str, step: int = 0, say: Callable[[str], None] = str) -> TrackerGroup:
    """Trackers of a run; its record goes to files in the folder."""
    folder.mkdir(exist_ok=True)

    def append(name: str, rows: Any) -> None:
        with open(folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    return open_trackers(find_trackers(names), TrackedRun(folder, step), append, say)


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


# --- names -----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_names_the_nearest_and_all() -> None:
    valid = "trackers: tensorboard, wandb, mlflow, trackio, package.module:Name"
    refused(f"unknown tracker 'tensorbord'; did you mean tensorboard? {valid}", lambda: find_trackers(["tensorbord"]))
    refused(f"unknown tracker 'x'; {valid}", lambda: check_tracker_names(["x"]))
    refused("did you mean wandb?", lambda: read_recipe("start", ['train.trackers=["wandbb"]']))
    refused("should be a list: ['wandb']", lambda: read_recipe("start", ["train.trackers=wandb"]))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_names_the_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda package: None)
    read_recipe("start", [f'train.trackers=["{name}"]'])  # a recipe can be read without it
    refused(f"{name} is not installed; type: pip install 'clasp-vl[{name}]'", lambda: find_trackers([name]))
    monkeypatch.undo()
    (tmp_path / name).mkdir()  # as wandb leaves it where one works
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        patch.delitem(sys.modules, name, raising=False)
        refused("is not installed", lambda: find_trackers([name]))
    extras = (Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8")
    assert f'{name} = ["{name}>=' in extras


def test_what_is_no_tracker_is_refused(tmp_path: Path) -> None:
    refused("No module named 'nowhere'", lambda: find_trackers(["nowhere:Name"]))
    refused("has no class 'Diry'; nearest: Diary", lambda: find_trackers(["toytrackers:Diry"]))
    refused("gave a Half, not a clasp.types.Tracker", lambda: opened(tmp_path, "toytrackers:Half"))


def test_the_table_makes_trackers_and_imports_no_service(tmp_path: Path) -> None:
    before = set(sys.modules)
    for path in TRACKERS.values():
        tracker = find_trackers([path])[path](TrackedRun(tmp_path))
        assert isinstance(tracker, Tracker)
    assert not (set(sys.modules) - before) & {"tensorboard", "wandb", "mlflow", "trackio"}
    assert not list(tmp_path.iterdir()), "nothing is written before config"


# --- the record ------------------------------------------------------------------------------------------------------


def test_json_lines_are_as_they_always_were() -> None:
    rows: list[tuple[str, dict[str, Any]]] = []
    tracker = JsonLinesTracker(lambda name, given: rows.extend((name, dict(row)) for row in given))
    tracker.config({"train": {}})
    tracker.log({"event": "start", "steps": 9, "precision": "float32"}, 0)
    tracker.log({"event": "skipped", "id": "a", "reason": "truncated"}, 3)
    tracker.log({"event": "step", "train/epoch": 1, "train/loss": 2.5}, 4)
    tracker.log({"event": "evaluation", "epoch": 1, "best": True, "validation/a/recall@1": 0.5}, 5)
    tracker.log({"event": "stop", "interrupted": True, "held_step": 5}, 5)
    tracker.log({"event": "cost", "cost/pairs": 5}, 5)
    tracker.finish(RESULTS)
    assert [json.dumps(row) for name, row in rows if name == "log.jsonl"] == [
        '{"event": "start", "step": 0, "steps": 9, "precision": "float32"}',
        '{"event": "skipped", "id": "a", "reason": "truncated"}',
        '{"event": "step", "step": 4, "epoch": 1, "loss": 2.5}',
        '{"event": "evaluation", "step": 5, "epoch": 1, "best": true, "metrics": {"a/recall@1": 0.5}}',
        '{"event": "stop", "step": 5, "interrupted": true, "held_step": 5, "metrics": {}}',
    ]
    results = [row for name, row in rows if name == "results.jsonl"]
    assert all(map(has_its_checksum, results)) and list(map(without_checksum, results)) == RESULTS


def test_nested_values_get_one_name() -> None:
    assert dict(flatten_results(RESULTS)) == {
        "results/retrieval/recall@1": 0.5,
        "results/retrieval/median_rank": 2.0,
        "results/retrieval/chance/recall@1": 0.1,
        "results/retrieval/recall@1/low": 0.4,
        "results/retrieval/recall@1/high": 0.6,
        "results/retrieval/n": 10,
        "results/retrieval/seconds": 0.25,
    }
    given = {"image": {"tower": "pip:a", "mean": [0.5, 0.5]}, "train": {"lr": 0.1, "lr_factors": {"head": 1.0}}}
    assert dict(flatten_recipe(given)) == {
        "image.tower": "pip:a",
        "image.mean": "[0.5, 0.5]",
        "train.lr": 0.1,
        "train.lr_factors.head": 1.0,
    }


# --- one that fails --------------------------------------------------------------------------------------------------


def test_an_unreachable_tracker_is_reported_once_and_loses_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with opened(tmp_path / "run", "toytrackers:Unreachable", "toytrackers:Diary", say=said.append) as tracker:
        tracker.config({})
        for step in range(1, 5):
            tracker.log({"event": "step", "train/loss": 1.0}, step)
        tracker.log_skipped([SkippedSample("a", "truncated")])
        tracker.finish(RESULTS)
    assert len(said) == 1 and said[0].startswith("tracker toytrackers:Unreachable failed and is left out from now on")
    assert "(ConnectionError: no route to host)" in said[0] and "\n" not in said[0]
    assert [row.get("step") for row in lines(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4, None]
    assert list(map(without_checksum, lines(tmp_path / "run" / "results.jsonl"))) == RESULTS
    written = lines(tmp_path / "run" / "diary.jsonl")
    assert [what for what, _, _ in written] == ["config", "config", *["log"] * 6, "finish"], "the other one goes on"


def test_one_that_cannot_start_is_a_mistake_to_mend(tmp_path: Path) -> None:
    with opened(tmp_path / "run", "toytrackers:Diary", "toytrackers:NeverThere") as tracker:
        refused(
            "train.trackers: toytrackers:NeverThere cannot start (ConnectionError: no route to host); mend this, or",
            lambda: tracker.config({}),
        )
    assert [what for what, _, _ in lines(tmp_path / "run" / "diary.jsonl")] == ["config", "finish"]


def test_a_full_disk_still_stops_the_run() -> None:
    def full(name: str, rows: Any) -> None:
        raise UserError("no space left")

    with pytest.raises(UserError, match="no space left"):
        TrackerGroup(JsonLinesTracker(full), {}, str).log({"event": "step"}, 1)


# --- services, where they are installed ------------------------------------------------------------------------------


def record(folder: Path, name: str) -> None:
    """A run that is stopped after two steps and goes on with two more."""
    for first in (0, 2):
        with opened(folder, name, step=first) as tracker:
            tracker.config({"train": {"lr": 0.1}, "image": {"mean": [0.5]}})
            tracker.log({"event": "start", "reason": "a word", "steps": 4}, first)
            for step in (first + 1, first + 2):
                tracker.log({"event": "step", "train/loss": float(step)}, step)
            tracker.log({"event": "evaluation", "best": True, "validation/recall@1": first / 4}, first + 2)
            tracker.finish(RESULTS if first else [])


def test_tensorboard_reads_the_curves_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(tmp_path / "run", "tensorboard")
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()

    def curve(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in read.Scalars(name)]

    assert curve("train/loss") == [(step, float(step)) for step in (1, 2, 3, 4)]
    assert curve("validation/recall@1") == [(2, 0.0), (4, 0.5)]
    assert curve("results/retrieval/recall@1") == [(4, 0.5)] and "steps" not in read.Tags()["scalars"]
    settings = list((tmp_path / "run" / "tensorboard").glob("*/hparams.yml"))
    assert len(settings) == 1 and "train.lr: 0.1" in settings[0].read_text(), "once, however often a run goes on"


def test_wandb_offline_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record(tmp_path / "run", "wandb")
    kept = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files and {file.stem.removeprefix("run-") for file in files} == {kept}
    written = b"".join(file.read_bytes() for file in files)
    for name in (b"train/loss", b"validation/recall@1", b"results/retrieval/recall@1"):
        assert name in written
