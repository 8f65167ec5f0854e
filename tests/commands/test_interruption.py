"""Ctrl-C and SIGTERM, wherever they come: one line, exit code 130, nothing that stays behind, no process that goes on.

Ctrl-C in training, a sweep, a climb and while a folder is watched: tests/commands/test_cli.py, test_sweep.py,
test_auto.py and test_growing_index.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clasp import __main__ as command
from clasp import cli
from clasp.commands import doctor, evaluate, export, launch, pair, report, search
from clasp.training.interrupt import interrupted_by_sigterm
from toydata import toys, write_csv
from toyruns import recipe, save_towers

VERBS: dict[str, tuple[ModuleType, str, list[str]]] = {
    "doctor": (doctor, "diagnose", ["heads", "data.train=sample:emoji"]),
    "eval": (evaluate, "evaluate_run", ["run", "zeroshot", "data=sample:emoji"]),
    "export": (export, "export_run", ["run", "--to", "hub", "-o", "out"]),
    "index": (search, "index_images", ["run", "images"]),
    "pair": (pair, "rank_tower_pairs", ["data.train=sample:emoji", "--image", "a", "--text", "b"]),
    "report": (report, "write_report", ["run", "-o", "page.html"]),
}


def end_of(main: Callable[[], object]) -> object:
    """The exit code."""
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_ends_with_one_line(
    verb: str,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def work(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    module, name, words = VERBS[verb]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(sys, "argv", ["clasp", verb, *words])
    assert end_of(cli.main) == 130
    said = capfd.readouterr()
    assert said.err.startswith("clasp: stopped; the same command") and not said.out
    assert said.err.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_while_the_verbs_are_imported(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    class Importing(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "clasp.cli", Importing("clasp.cli"))
    assert end_of(command.start_command) == 130
    assert capfd.readouterr().err.count("\n") == 1


def test_of_several_processes_one_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        assert end_of(launch.exit_interrupted) == 130 and not capfd.readouterr().err
    monkeypatch.setenv("CLASP_LAUNCHER", f"{os.getppid()} {tmp_path}")
    assert end_of(launch.exit_interrupted) == 130 and not capfd.readouterr().err
    launch.begin_to_report()
    assert [path.name for path in tmp_path.iterdir()] == ["reporting"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12, if torch has threads
def test_a_fork_is_ended_by_sigterm_as_usual() -> None:
    with interrupted_by_sigterm():
        child = os.fork()
        if not child:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


# --- the launcher ----------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of 10,000 epochs on two processes, as it is typed."""
    made = recipe(save_towers(tmp_path / "towers"), write_csv(toys(64), tmp_path / "pairs"), "train.epochs=10000")
    (tmp_path / "toy.toml").write_text(made.to_toml(), encoding="utf-8")
    typed = ("-m", "clasp", "train", str(tmp_path / "toy.toml"), "--name", "run", "--runs", str(tmp_path))
    environment = {**os.environ, "CLASP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *typed, "--processes", "2"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.kill()


def children(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False)
    return list(map(int, found.stdout.split()))


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_while_the_processes_start(number: signal.Signals, launched: subprocess.Popen[str]) -> None:
    started = wait_for(lambda: len(found := children(launched.pid)) > 1 and found)
    wait_for(lambda: all("torch" in Path(f"/proc/{child}/maps").read_text() for child in started))
    launched.send_signal(number)
    _, said = launched.communicate(timeout=100)
    assert launched.returncode == 130
    assert said.strip().startswith("stopped before training") and said.count("\n") == 1
    assert not any(Path(f"/proc/{child}").exists() for child in started)


@pytest.mark.faults
def test_processes_end_with_their_launcher(launched: subprocess.Popen[str], tmp_path: Path) -> None:
    """Killed, the launcher cannot end them: each saves its state and ends."""
    wait_for(lambda: (tmp_path / "run" / "state").exists() and (tmp_path / "run" / "log.jsonl").exists())
    started = children(launched.pid)
    launched.kill()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in started))
    assert (tmp_path / "run" / "state" / "state.safetensors").exists()
