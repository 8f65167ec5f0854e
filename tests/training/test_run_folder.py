"""What a run folder promises: damage is named, two states are kept, a kill at any moment loses nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch

import clasp
from clasp.commands import train as main_job
from clasp.config.recipe import Recipe
from clasp.data.folder_lock import lock_folder
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.tasks import EvaluationTask, ScoredQueries
from clasp.report.run_record import read_results
from clasp.training.run_folder import RunFolder
from clasp.training.trackers.console import SilentReporter, TrainProgress
from clasp.types import UserError
from toydata import toys, write_csv
from toyruns import delta, lines, recipe, run, save_towers

SETTINGS = ("head.noise=0.5", "train.save_every_minutes=1e-9", "train.epochs=2", "train.batch_size=14")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("world")
    return recipe(save_towers(folder / "towers"), write_csv(toys(64), folder / "pairs"), *SETTINGS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "run-folder-cache"
    monkeypatch.setenv("CLASP_CACHE", str(folder))
    return folder


@pytest.fixture
def whole(made: Recipe, tmp_path: Path) -> Path:
    run(made, tmp_path / "whole")
    return tmp_path / "whole"


class StopHard(SilentReporter):
    """Ends the process, as far as the run can tell, after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, progress: TrainProgress) -> None:
        if progress.step == self.at:
            raise SystemExit("no power")


@pytest.fixture
def stopped(made: Recipe, tmp_path: Path) -> Path:
    with pytest.raises(SystemExit):
        main_job.train_recipe(made, tmp_path / "stopped", say=str, reporter=StopHard(4))
    assert sorted(path.name for path in (tmp_path / "stopped/state").iterdir()) == [
        "previous.safetensors",
        "state.safetensors",
    ]
    return tmp_path / "stopped"


def go_on(folder: Path) -> None:
    run(Recipe.model_validate(tomllib.loads((folder / "recipe.toml").read_text())), folder, resume=True)


def flip(path: Path, seed: int) -> None:
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


# --- delta, preprocessing --------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_delta_transform_and_tokenizer_is_named(whole: Path, tmp_path: Path) -> None:
    clasp.load(whole)
    for name in ("delta.safetensors", "transform.json", "tokenizer/tokenizer.json"):
        for seed in range(8):
            hurt = shutil.copytree(whole, tmp_path / f"{Path(name).stem}{seed}")
            flip(hurt / name, seed)
            with pytest.raises(UserError, match=re.escape(name)) as told:
                clasp.load(hurt)
            assert "\n" not in str(told.value)


def test_a_recipe_that_was_changed_is_said(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    clasp.load(whole)
    assert "was changed" not in caplog.text
    path = whole / "recipe.toml"
    path.write_text(path.read_text().replace("seed = ", "seed = 1"))
    clasp.load(whole)
    assert f"{path} was changed since the run was saved: train.seed = 11 (was 1)" in caplog.text


def test_a_run_without_hashes_loads_with_a_warning(
    whole: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    expected = delta(whole)
    safetensors.torch.save_file(expected, whole / "delta.safetensors", {"format": "1"})
    base = json.loads((whole / "base.json").read_text())
    del base["files"]
    (whole / "base.json").write_text(json.dumps(base))
    assert clasp.load(whole).encode_text(["a red ring"]).shape == (1, 16)
    assert "delta.safetensors was written by an earlier clasp" in caplog.text
    assert "without hashes of transform.json" in caplog.text and len(caplog.records) == 2


# --- states ----------------------------------------------------------------------------------------------------------


def test_a_damaged_state_is_named_and_the_one_before_is_used(
    whole: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(4):
        hurt = shutil.copytree(stopped, tmp_path / f"hurt{seed}")
        flip(hurt / "state/state.safetensors", seed)
        caplog.clear()
        go_on(hurt)
        assert "state.safetensors is damaged" in caplog.text and "step 2" in caplog.text
        assert (hurt / "delta.safetensors").read_bytes() == (whole / "delta.safetensors").read_bytes()
    for name in ("state", "previous"):
        path = stopped / f"state/{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"state.safetensors is damaged.*previous.safetensors is damaged.*no whole"):
        go_on(stopped)


def test_the_state_of_another_run_or_of_an_edited_recipe_is_refused(
    made: Recipe, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    with pytest.raises(SystemExit):
        main_job.train_recipe(made.with_overrides(["train.seed=5"]), other, say=str, reporter=StopHard(3))
    shutil.copy(other / "state/state.safetensors", stopped / "state/state.safetensors")
    assert RunFolder(stopped).read_state().position.step == 2
    assert "state.safetensors is the state of another run" in caplog.text
    text = (stopped / "recipe.toml").read_text()
    (stopped / "recipe.toml").write_text(text.replace("lr = 0.003", "lr = 0.004"))
    assert text != (stopped / "recipe.toml").read_text()
    with pytest.raises(UserError, match=r"recipe.toml was changed .*: train.lr = 0.004 \(was 0.003\); a run goes on"):
        RunFolder(stopped).read_state()
    (base := json.loads((stopped / "base.json").read_text())).pop("settings")  # as an earlier version wrote it
    (stopped / "base.json").write_text(json.dumps(base))
    with pytest.raises(UserError, match="no whole state is left"):
        RunFolder(stopped).read_state()
    (stopped / "recipe.toml").write_text("# a remark\n" + text)
    assert RunFolder(stopped).read_state().position.step == 2


def test_a_state_of_an_earlier_version_goes_on(whole: Path, stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = stopped / "state/state.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(file.metadata()["clasp"])["facts"]
    safetensors.torch.save_file(tensors, path, {"facts": facts})
    (stopped / "state/previous.safetensors").unlink()
    text = (stopped / "recipe.toml").read_text()
    (stopped / "recipe.toml").write_text(text.replace('precision = "float32"', 'precision = "auto"'))
    (base := json.loads((stopped / "base.json").read_text())).pop("settings")
    (stopped / "base.json").write_text(json.dumps(base))
    go_on(stopped)
    assert "written by an earlier clasp" in caplog.text
    assert (stopped / "delta.safetensors").read_bytes() == (whole / "delta.safetensors").read_bytes()


def test_auto_is_decided_once_and_kept(made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto, folder = made.with_overrides(["train.precision=auto", "train.attention=auto"]), tmp_path / "auto"
    with pytest.raises(SystemExit):
        main_job.train_recipe(auto, folder, say=str, reporter=StopHard(2))
    written = tomllib.loads((folder / "recipe.toml").read_text())["train"]
    assert written["precision"] in ("float32", "bfloat16") and written["attention"] in ("fused", "plain")
    assert RunFolder(folder).read_state().precision == written["precision"]


WAYS = {
    "float32, cache deleted": [],
    "bfloat16, cache deleted": ["train.precision=bfloat16", "train.attention=plain"],
    "live images, workers": ["data.feature_cache=off", "data.augment.flip=0.5", "train.workers=1"],
}


@pytest.mark.parametrize("way", WAYS)
def test_resumed_with_a_cold_cache_or_workers_is_bitwise_the_same(
    way: str, made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made.with_overrides(WAYS[way])
    if "train.precision=bfloat16" in WAYS[way]:  # filled by a run in float32, of another attention kernel
        monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
        run(made.with_overrides(["train.precision=float32", "train.attention=fused"]), tmp_path / "other")
    run(made.with_overrides(["train.workers=0"]), tmp_path / "whole")
    with pytest.raises(SystemExit):
        main_job.train_recipe(made, tmp_path / "stopped", say=str, reporter=StopHard(4))
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cold"))
    go_on(tmp_path / "stopped")
    files = [tmp_path / name / "delta.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- two at once, and failed starts ----------------------------------------------------------------------------------


def test_a_second_process_is_told(made: Recipe, stopped: Path, tmp_path: Path) -> None:
    with lock_folder(tmp_path / "new"), pytest.raises(UserError, match="is being written to by process"):
        run(made, tmp_path / "new")
    with lock_folder(stopped), pytest.raises(UserError, match="is being written to by process"):
        go_on(stopped)
    with lock_folder(stopped), pytest.raises(UserError, match="is being written to by process"):
        run(made, stopped)  # not told to delete it


class Moved(SilentReporter):
    """Moves the run folder after a step; in its place is the start of another run, if any."""

    def __init__(self, folder: Path, replaced: bool) -> None:
        self.folder, self.replaced = folder, replaced

    def step(self, progress: TrainProgress) -> None:
        if progress.step == 3:
            self.folder.rename(self.folder.with_name("moved"))
            if self.replaced:
                self.folder.mkdir()
                (self.folder / "recipe.toml").write_text("another run")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_moved_while_it_trains_goes_on_where_it_is(
    replaced: bool, made: Recipe, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="run was moved, deleted or replaced"):
        main_job.train_recipe(made, folder, say=str, reporter=Moved(folder, replaced))
    there = [path.name for path in folder.iterdir()] if folder.exists() else []
    assert there == (["recipe.toml"] if replaced else []), "nothing is written into another run"
    go_on(tmp_path / "moved")
    assert (tmp_path / "moved/delta.safetensors").read_bytes() == (whole / "delta.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["recipe.toml", "results.jsonl", "base.json"])
def test_a_file_that_an_editor_gave_a_byte_order_mark_is_read(whole: Path, name: str) -> None:
    (whole / name).write_bytes(b"\xef\xbb\xbf" + (whole / name).read_bytes())
    assert RunFolder(whole).recipe()["train"]["epochs"] == 2 and read_results(whole) and RunFolder(whole).base()


def test_a_first_save_that_was_interrupted_is_told_alike_and_train_goes_on(made: Recipe, stopped: Path) -> None:
    for path in (stopped / "state").iterdir():
        path.rename(path.with_name(f"next-{path.name}.123.part"))
    with pytest.raises(UserError, match=r"stopped before its first state was saved.*start it again with clasp train"):
        go_on(stopped)
    run(made, stopped)
    assert not (stopped / "state").exists() and not list(stopped.rglob("*.part"))


def test_results_are_there_once_where_a_run_was_killed_after_it_wrote_them(
    made: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: RunFolder) -> None:
        raise SystemExit("no power")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunFolder, "finish", killed)
        run(made, tmp_path / "killed")
    results = tmp_path / "killed" / "results.jsonl"
    written = lines(results)
    go_on(tmp_path / "killed")
    assert lines(results) == written and len(written) == len(lines(whole / "results.jsonl"))


def test_another_evaluation_of_a_run_that_ended_adds_no_results(
    made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on another number of threads, whose metrics differ in the last bits."""

    def finish(task: EvaluationTask, scored: list[ScoredQueries]) -> list[EvaluationResult]:
        return [replace(row, metrics={name: v + 1e-9 for name, v in row.metrics.items()}) for row in real(task, scored)]

    def killed(folder: RunFolder) -> None:
        raise SystemExit("no power")

    real, folder = EvaluationTask.finish, tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunFolder, "finish", killed)
        run(made, folder)
    written = (folder / "results.jsonl").read_bytes()
    hurt = shutil.copytree(folder, tmp_path / "hurt")
    flip(hurt / "state/results.json", 0)
    go_on(hurt)
    assert "results.json is damaged" in caplog.text
    monkeypatch.setattr(EvaluationTask, "finish", finish)
    go_on(folder)
    for ended in (folder, hurt):
        assert (ended / "results.jsonl").read_bytes() == written and not (ended / "state").exists()


def test_results_are_on_disk_before_the_state_is_deleted(
    made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []

    def record(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((file.name, file.stat().st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    run(made, tmp_path / "run")
    for name in ("log.jsonl", "results.jsonl"):
        assert (name, (tmp_path / "run" / name).stat().st_size) in synced, name


# --- kills -----------------------------------------------------------------------------------------------------------

MOMENTS = {  # a name, and the how manieth time that something is renamed to it: the process is killed just before
    "the first state": ("state.safetensors", 1),
    "between two generations": ("state.safetensors", 3),
    "the card": ("README.md", 1),
}
KILLED = """
import os, signal, sys, tomllib
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from clasp.config.recipe import recipe_from_dict
from toyruns import run
from transformers import BertModel, ViTModel  # once, not in every child
made, folder = recipe_from_dict(tomllib.loads(sys.argv[2]), "toy"), Path(sys.argv[3])
real = os.replace
for number, (name, times) in enumerate(zip(sys.argv[4::2], map(int, sys.argv[5::2]))):
    if not os.fork():
        seen = []
        def replace(source, to):
            seen.append(Path(to).name)
            if seen.count(name) == times and seen[-1] == name:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, to)
        os.replace = replace
        run(made, folder / str(number))
        os._exit(0)
    _, status = os.wait()
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended", flush=True)
"""


@pytest.mark.faults
def test_a_kill_at_any_moment_loses_no_run(made: Recipe, whole: Path, tmp_path: Path) -> None:
    words = [str(word) for moment in MOMENTS.values() for word in moment]
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", KILLED, tests, made.to_toml(), str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["9"] * len(MOMENTS), done.stderr
    for number, moment in enumerate(MOMENTS):
        folder = tmp_path / str(number)
        if RunFolder(folder).has_state:
            with pytest.raises(UserError, match="clasp resume"):
                run(made, folder)
            go_on(folder)
        else:
            assert moment == "the first state"
            run(made, folder)
        assert (folder / "delta.safetensors").read_bytes() == (whole / "delta.safetensors").read_bytes(), moment
        assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}, moment
        assert lines(folder / "results.jsonl")[-1]["metrics"] == lines(whole / "results.jsonl")[-1]["metrics"]
