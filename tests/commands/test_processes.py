"""``clasp train`` on several processes: the run of one, also after an interruption; a death ends it with a reason.

The processes are forks of one that has imported torch, with the environment of torchrun; one test uses the launcher.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from clasp import cli
from clasp.commands import launch
from clasp.config.recipe import Recipe
from clasp.types import UserError
from toydata import toys, write_csv
from toyprocesses import fork_context
from toyruns import delta, lines, recipe, run

TUNED = ('tune.image=["lora(rank=2)"]', 'tune.text=["norms"]', "train.micro_batch=4", "data.max_bad_fraction=0.1")
LONG = ("train.epochs=30", "train.evaluate_every=10")  # something is left to stop


@dataclass
class World:
    folder: Path
    made: Recipe

    @property
    def toml(self) -> Path:
        return self.folder / "toy.toml"

    def alone(self, name: str, *overrides: str) -> Path:
        """The run on one process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CLASP_CACHE", str(self.folder / "cache"))
            run(self.made.with_overrides(overrides), self.folder / name)
        return self.folder / name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, towers: Path) -> World:
    """A recipe with an image that cannot be read."""
    folder = tmp_path_factory.mktemp("world")
    pairs = write_csv(toys(64), folder / "pairs")
    sorted((folder / "pairs").rglob("*.png"))[5].write_bytes(b"no image")
    world = World(folder, recipe(towers, pairs, *TUNED, "train.epochs=4", "train.evaluate_every=2"))
    world.toml.write_text(world.made.to_toml(), encoding="utf-8")
    return world


@pytest.fixture(scope="module")
def long(world: World) -> Path:
    """The run of ``LONG`` on one process."""
    return world.alone("long", *LONG)


def work(rank: int, size: int, port: int, folder: str, arguments: Sequence[str], restarts: int) -> None:
    """One of the processes of the command."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    told["TORCHELASTIC_RESTART_COUNT"] = restarts
    os.environ.update({name: str(number) for name, number in told.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), CLASP_CACHE=f"{folder}/cache")
    torch.set_num_threads(1)
    sys.argv = ["clasp", *arguments]
    sys.stdout = sys.stderr = open(f"{folder}/said-{rank}.txt", "w", encoding="utf-8")
    cli.main()


def start(world: World, *arguments: str, size: int = 2, restarts: int = 0) -> list[ForkServerProcess]:
    context = fork_context()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    made = [
        context.Process(target=work, args=(rank, size, port, str(world.folder), arguments, restarts))
        for rank in range(size)
    ]
    for process in made:
        process.start()
    return made


def end(processes: Sequence[ForkServerProcess]) -> list[int | None]:
    """Their exit codes."""
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def said(world: World, rank: int) -> str:
    return (world.folder / f"said-{rank}.txt").read_text(encoding="utf-8")


def wait_for_steps(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if (folder / "log.jsonl").exists() and sum('"step", "step"' in line for line in _read(folder)) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{folder} has not come to {count} lines of steps")


def _read(folder: Path) -> list[str]:
    return (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()


def assert_same_run(one: Path, two: Path) -> None:
    """To rounding: the weights, the metrics; exactly: the recipe, what was skipped."""
    expected, found = delta(one), delta(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    assert (one / "recipe.toml").read_bytes() == (two / "recipe.toml").read_bytes()
    assert results(one) == results(two)
    skipped = [[row["id"] for row in lines(folder / "log.jsonl") if row["event"] == "skipped"] for folder in (one, two)]
    assert set(skipped[0]) == set(skipped[1])


def results(folder: Path) -> list[tuple[str, dict[str, float], int]]:
    return [(row["task"], row["metrics"], row["n"]) for row in lines(folder / "results.jsonl")]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.faults)])
def test_several_processes_write_the_run_of_one(size: int, world: World):
    name = f"of {size}"
    processes = start(world, "train", str(world.toml), "--name", name, "--runs", str(world.folder), size=size)
    assert end(processes) == [0] * size, "".join(said(world, rank) for rank in range(size))
    alone = world.alone(f"beside {name}")
    assert_same_run(alone, world.folder / name)
    assert not any(said(world, rank) for rank in range(1, size)), "only the first process reports"
    first, *_ = lines(world.folder / name / "log.jsonl")
    assert first["processes"] == size
    cost = json.loads((world.folder / name / "cost.json").read_text())["sum"]
    spent = json.loads((alone / "cost.json").read_text())["sum"]
    assert (cost["steps"], cost["pairs"]) == (spent["steps"], spent["pairs"])


def test_two_processes_read_the_feature_cache_and_evaluate_as_one(world: World, towers: Path):
    """Locked towers: the files of the cache are bitwise those of one process, and so is the first evaluation."""
    made = recipe(towers, world.folder / "pairs" / "pairs.csv", "data.max_bad_fraction=0.1")
    (world.folder / "locked.toml").write_text(made.to_toml(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(world.folder / "cache-alone"))
        run(made, world.folder / "locked-alone")
    processes = start(
        world, "train", str(world.folder / "locked.toml"), "--name", "locked", "--runs", str(world.folder)
    )
    assert end(processes) == [0, 0], said(world, 0) + said(world, 1)
    files = sorted((world.folder / "cache-alone" / "features").glob("*.npy"))
    assert len(files) > 2, "images and captions of the training pairs, images of the validation pairs"
    for file in files:
        assert (world.folder / "cache" / "features" / file.name).read_bytes() == file.read_bytes()
    first = [
        next(row for row in lines(world.folder / name / "log.jsonl") if row["event"] == "evaluation")
        for name in ("locked-alone", "locked")
    ]
    assert first[0] == first[1]
    assert_same_run(world.folder / "locked-alone", world.folder / "locked")


@pytest.mark.faults
def test_a_signal_to_one_stops_both_after_the_same_step_and_one_process_goes_on(world: World, long: Path):
    folder = world.folder / "stopped"
    processes = start(world, "train", str(world.toml), *LONG, "--name", "stopped", "--runs", str(world.folder))
    wait_for_steps(folder, 3)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGTERM)
    assert end(processes) == [130, 130]
    assert "resume with: clasp resume" in said(world, 0)
    stop = lines(folder / "log.jsonl")[-1]
    assert stop["event"] == "stop" and stop["interrupted"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(world.folder / "cache"))
        patch.setattr(sys, "argv", ["clasp", "resume", str(folder)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    assert_same_run(long, folder)


@pytest.mark.faults
def test_a_process_that_is_killed_ends_the_run_which_goes_on_when_torchrun_restarts_them(world: World, long: Path):
    folder = world.folder / "killed"
    typed = ("train", str(world.toml), *LONG, "--name", "killed", "--runs", str(world.folder))
    processes = start(world, *typed)
    wait_for_steps(folder, 3)
    began = time.monotonic()
    processes[1].kill()
    assert end(processes) == [2, -signal.SIGKILL]
    assert time.monotonic() - began < 30
    assert "clasp: process 0 of 2 ends, since another has ended" in said(world, 0)
    assert end(start(world, *typed, restarts=1)) == [0, 0], said(world, 0) + said(world, 1)
    assert_same_run(long, folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=x", "train.batch_size"),
        ("data.train=nowhere.csv", "nowhere.csv"),
        ('train.trackers=["nobody"]', "unknown tracker 'nobody'"),
        ("train.lr=1e30", "the step was not taken"),
    ],
    ids=["key", "pairs", "tracker", "diverged"],
)
def test_errors_of_the_user_are_reported_once(world: World, override: str, message: str):
    processes = start(world, "train", str(world.toml), override, "--name", "wrong", "--runs", str(world.folder))
    assert end(processes) == [2, 2]
    assert message in said(world, 0) and said(world, 1) == ""


@pytest.mark.faults
def test_the_launcher_starts_them(world: World):
    """The command as it is typed, with torch's launcher."""
    command = (sys.executable, "-m", "clasp", "train", str(world.toml), "train.epochs=1", "--name", "launched")
    done = subprocess.run(
        [*command, "--runs", str(world.folder), "--processes", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CLASP_CACHE": str(world.folder / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the run is in") == 1
    assert lines(world.folder / "launched" / "log.jsonl")[0]["processes"] == 2


def test_what_needs_one_process_is_refused(world: World, monkeypatch: pytest.MonkeyPatch, capsys: Callable):
    for arguments, message in (
        (
            ["train", str(world.toml), "--grid", "train.lr=1,2"],
            "--grid trains one run after another on one process, not",
        ),
        (["train", "auto", f"data.train={world.folder}", "--minutes", "1"], "which has [auto], trains one run after"),
        (["train", str(world.toml), "--name", "many"], "--processes 9999: this machine has"),
    ):
        count = "9999" if "--name" in arguments else "2"
        monkeypatch.setattr(sys, "argv", ["clasp", *arguments, "--processes", count])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_a_restart_needs_a_name(world: World):
    assert end(start(world, "train", str(world.toml), "--runs", str(world.folder / "other"), restarts=1)) == [2, 2]
    assert "--max-restarts of torchrun needs --name" in said(world, 0) and said(world, 1) == ""


def test_torchrun_does_not_nest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="inside of torchrun"):
        launch.require_processes(1)
