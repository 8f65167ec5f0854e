"""Sweeps on the toy world: grids are checked whole, towers are asked once, a stopped sweep goes on, runs are ranked."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest

from clasp.commands import sweep as sweeping
from clasp.commands.sweep import sweep
from clasp.config import build as assembling
from clasp.config.grid import GridSpec, expand_grid, parse_axis
from clasp.models import text_side
from clasp.models.tower import Tower
from clasp.report.leaderboard import SweepResult, SweepRow, ranking_key, read_sweep_rows, write_sweep_rows
from clasp.training.trackers.console import SilentReporter, TrainProgress
from clasp.types import UserError
from toydata import toys, write_classes, write_csv, write_images
from toyruns import lines, recipe, run

TOYS = toys(48)
GRID = ("train.lr=1e-3,3e-3", "head.kind=linear,mlp")
NAMES = ["lr=1e-3,kind=linear", "lr=1e-3,kind=mlp", "lr=3e-3,kind=linear", "lr=3e-3,kind=mlp"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toml(towers: Path, tmp_path: Path) -> str:
    pairs = write_csv(TOYS, tmp_path / "pairs")
    (tmp_path / "toy.toml").write_text(recipe(towers, pairs, "train.epochs=2").to_toml())
    return str(tmp_path / "toy.toml")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Rows that went through each tower, and how often towers were loaded."""
    counts, pooled, open_base = {"image": 0, "text": 0, "loaded": 0}, Tower.pooled, assembling.load_backbone

    def watched(self: Tower, inputs):
        answer = pooled(self, inputs)
        counts[self.modality] += len(answer)
        return answer

    def opened(settings, *, meta: bool = False, seed: int = 0):
        counts["loaded"] += not meta
        return open_base(settings, meta=meta, seed=seed)

    monkeypatch.setattr(Tower, "pooled", watched)
    monkeypatch.setattr(assembling, "load_backbone", opened)
    return counts


def swept(toml: str, folder: Path, *overrides: str, grid: tuple[str, ...] = GRID, **more) -> SweepResult:
    return sweep(GridSpec(toml, overrides, grid), folder, say=str, **more)


# --- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, key, values",
    [
        ("train.lr=1e-3,3e-3", "train.lr", ["1e-3", "3e-3"]),
        ("head.kind=linear, mlp", "head.kind", ["linear", "mlp"]),
        ('tune.text=["norms"],["lora(rank=8)", "norms"]', "tune.text", ['["norms"]', '["lora(rank=8)", "norms"]']),
        ("head.ridge=[1,1],[2, 2]", "head.ridge", ["[1,1]", "[2, 2]"]),
        ('text.prefix="a, b",""', "text.prefix", ['"a, b"', '""']),
        ('tune.image=[\'match("a,b]")\'],["none"]', "tune.image", ["['match(\"a,b]\")']", '["none"]']),
    ],
)
def test_commas_separate_outside_of_brackets_and_quotes(text: str, key: str, values: list[str]) -> None:
    assert parse_axis(text) == (key, values)


def test_every_combination_has_its_recipe_and_a_name_that_stays(toml: str) -> None:
    made = expand_grid(toml, ["train.epochs=5"], GRID)
    assert [one.name for one in made] == NAMES
    assert [(one.recipe.train.lr, one.recipe.head.kind) for one in made] == [
        (1e-3, "linear"),
        (1e-3, "mlp"),
        (3e-3, "linear"),
        (3e-3, "mlp"),
    ]
    assert {one.recipe.train.epochs for one in made} == {5}
    more = expand_grid(toml, [], ("train.lr=1e-2,1e-3,3e-3", GRID[1]))
    assert set(NAMES) < {one.name for one in more}
    odd = expand_grid(toml, [], ('tune.text=["norms"],["lora(rank=8)"],["lora(rank = 8)", "norms"]',))
    assert [one.name for one in odd] == ["text=norms", "text=lora-rank-8", "text=lora-rank-8-norms"]
    alike = expand_grid(toml, [], ('text.prefix="a:","a;"', "image.pool=cls,mean", "text.pool=cls,mean"))
    assert len({one.name for one in alike}) == 8 and all("image.pool=" in one.name for one in alike)


MISTAKES = {
    "no value": (["train.lr"], "is not key=value,value"),
    "one value": (["train.lr=1e-3"], "has one value"),
    "a list for a value": (
        ['tune.text=[["norms"],["biases"]]'],
        'has one value; .* tune.text=\\["norms"\\],\\["biases"\\]',
    ),
    "an empty value": (["train.lr=1e-3,,1"], "a value is empty"),
    "an open bracket": (['tune.text=["norms","biases"'], "is not closed"),
    "an unknown key": (["train.lrr=1,2"], "with train.lrr=1: .*did you mean train.lr"),
    "a wrong value": (["head.kind=linear,lineer"], "with head.kind=lineer: .*'linear', 'mlp'"),
    "a key twice": (["train.lr=1,2", "train.lr=3,4"], "train.lr is set twice"),
    "a key beside an override": (["train.epochs=1,2"], "train.epochs is set twice"),
    "the same twice": (["train.lr=0.001,1e-3"], "train.lr=1e-3: this is the same recipe as with train.lr=0.001"),
    "other questions": (["data.val_fraction=0.2,0.3"], "validation pairs differ"),
    "matches nothing": (['tune.text=["norms"],["match(\'x\')"]'], "with tune.text=.*matches nothing"),
    "too large a batch": (["train.batch_size=8,1000"], "with train.batch_size=1000: .* is more than the"),
    "no such tower": (["image.tower=file:{towers}/image,file:void"], "with image.tower=file:void: .*no folder void"),
    "no such data": (["data.train={pairs},pears.csv", "data.val={pairs}"], "pears.csv does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_one_is_told_before_anything_is_computed(
    mistake: str, toml: str, towers: Path, tmp_path: Path, cache: Path, asked: dict[str, int]
) -> None:
    grid, wanted = MISTAKES[mistake]
    pairs = tmp_path / "pairs" / "pairs.csv"
    grid = [text.format(towers=towers, pairs=pairs) for text in grid]
    given = ["train.epochs=2"] + [text for text in grid if text.startswith("data.val=")]
    with pytest.raises(UserError, match=wanted) as error:
        swept(toml, tmp_path / "runs", *given, grid=tuple(text for text in grid if not text.startswith("data.val=")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists() and not (cache / "features").exists()
    assert asked == {"image": 0, "text": 0, "loaded": 0}


# --- runs ------------------------------------------------------------------------------------------------------------


def test_towers_are_loaded_and_asked_once_and_every_run_is_as_if_trained_alone(
    toml: str, tmp_path: Path, cache: Path, asked: dict[str, int]
) -> None:
    done = swept(toml, tmp_path / "runs")
    captions = {toy.caption for toy in TOYS}
    assert asked["loaded"] == 2 and asked["image"] == len(TOYS)
    assert len(captions) <= asked["text"] <= 2 * len(captions)
    assert len(list((cache / "features").glob("*.npy"))) == 4
    assert done.folder == tmp_path / "runs" / "toy-sweep" and not done.stopped
    assert {path.name for path in done.folder.iterdir()} == {*NAMES, "sweep.jsonl"}
    for one in expand_grid(toml, [], GRID):
        alone = run(one.recipe, tmp_path / "alone" / one.name)
        name = f"{one.name}/delta.safetensors"
        assert (done.folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
        row = next(row for row in done.rows if row.run == str(done.folder / one.name))
        assert row.value == alone.results[-1].metrics["mean_recall"]
    assert asked["loaded"] == 10, "each of the four alone loads both"


def test_rows_say_it_all_and_are_ranked(toml: str, tmp_path: Path) -> None:
    done = swept(toml, tmp_path / "runs", "train.seed=3")
    values = [row.value for row in done.rows]
    assert values == sorted(values, reverse=True) and len(set(values)) > 1
    for row in done.rows:
        results = lines(Path(row.run) / "results.jsonl")[-1]
        assert (row.value, row.n) == (results["metrics"]["mean_recall"], results["n"])
        assert (
            list(row.interval) == results["interval"]["mean_recall"] and row.chance == results["chance"]["mean_recall"]
        )
        assert row.overrides == ("train.seed=3", *row.settings) and row.seconds > 0
        assert row.metric == "retrieval/mean_recall" and row.state == "finished"
    written = [SweepRow.from_dict(line) for line in lines(done.folder / "sweep.jsonl")]
    assert [Path(row.run).name for row in written] == NAMES and sorted(written, key=ranking_key) == done.rows
    assert done.summary_lines()[0].startswith(f"best: {done.rows[0].run}")
    assert done.columns == ("set", "mean recall", "95 %", "chance", "n", "s") and len(done.cells[0]) == 6


def test_towers_that_train_are_loaded_anew(toml: str, tmp_path: Path, asked: dict[str, int]) -> None:
    grid = ('tune.text=["norms"],["lora(rank=2)"]',)
    done = swept(toml, tmp_path / "runs", grid=grid)
    assert asked["loaded"] == 4
    for one in expand_grid(toml, [], grid):
        run(one.recipe, tmp_path / "alone" / one.name)
        name = f"{one.name}/delta.safetensors"
        assert (done.folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("kind", ["classes", "languages"])
def test_what_decides_is_what_the_pairs_are_asked(kind: str, towers: Path, tmp_path: Path) -> None:
    if kind == "classes":
        pairs, metric = write_classes(TOYS, tmp_path / "classes"), "zeroshot/top1"
    else:
        write_images(TOYS, tmp_path)
        rows = [{"image": f"images/{t.key}.png", "caption": {"en": t.caption, "sw": t.shape}} for t in TOYS]
        pairs, metric = tmp_path / "pairs.jsonl", "multilingual/macro:all/mean_recall"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.toml").write_text(recipe(towers, pairs, "train.epochs=1").to_toml())
    done = swept(str(tmp_path / "toy.toml"), tmp_path / "runs", grid=GRID[:1])
    assert {row.metric for row in done.rows} == {metric}
    log = [row for row in lines(Path(done.rows[0].run) / "log.jsonl") if row["event"] == "stop"]
    # the loop names numbers without the task
    assert log[-1]["metrics"][metric.partition("/")[2]] == pytest.approx(done.rows[0].value)


# --- it stops and goes on --------------------------------------------------------------------------------------------


class StopAt(SilentReporter):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, progress: TrainProgress) -> None:
        if progress.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def reporters(stop_in: int, step: int):
    """Reporters of run after run, of which one presses Ctrl-C."""
    made = iter(range(1, 100))
    return lambda: StopAt(step) if next(made) == stop_in else SilentReporter()


def test_a_stopped_sweep_goes_on_when_typed_again(toml: str, tmp_path: Path, asked: dict[str, int]) -> None:
    grid = ("train.lr=1e-3,3e-3,1e-2",)
    names = ["lr=1e-3", "lr=3e-3", "lr=1e-2"]
    whole = swept(toml, tmp_path / "whole", grid=grid)
    stopped = swept(toml, tmp_path / "runs", grid=grid, reporter=reporters(2, 3))
    assert stopped.stopped and [row.state for row in stopped.rows] == ["finished", "stopped"]
    assert (stopped.folder / names[1] / "state").exists() and not (stopped.folder / names[2]).exists()
    first = stopped.folder / names[0] / "delta.safetensors"
    written, seconds = first.stat().st_mtime_ns, stopped.rows[1].seconds
    asked.update(image=0, text=0)
    said: list[str] = []
    done = sweep(GridSpec(toml, [], grid), tmp_path / "runs", say=said.append)
    assert done.folder == stopped.folder and not done.stopped and len(done.finished) == 3
    assert asked["image"] == asked["text"] == 0 and first.stat().st_mtime_ns == written
    assert next(line for line in said if line.startswith("run ")) == "run 2 of 3: train.lr=3e-3"
    for name in names:
        one, other = (folder / name / "delta.safetensors" for folder in (done.folder, whole.folder))
        assert one.read_bytes() == other.read_bytes(), name
    assert [row.value for row in done.rows] == [row.value for row in whole.rows]
    resumed = next(row for row in done.rows if row.run.endswith(names[1]))
    assert resumed.seconds > seconds > 0, "the seconds before the stop count"


def test_nothing_is_written_into_a_folder_in_place_of_a_moved_one(toml: str, tmp_path: Path) -> None:
    class Moves(SilentReporter):
        def step(self, progress: TrainProgress) -> None:
            if progress.step == 3:
                folder.rename(tmp_path / "moved")
                folder.mkdir()

    folder = tmp_path / "runs" / "toy-sweep"
    with pytest.raises(UserError, match="toy-sweep was moved, deleted or replaced"):
        swept(toml, tmp_path / "runs", grid=GRID[:1], reporter=Moves)
    assert not list(folder.iterdir())


def test_rows_that_an_editor_saved_are_read(tmp_path: Path) -> None:
    row = SweepRow("runs/one", (), (), "failed", error="a\u2028b")
    write_sweep_rows(tmp_path, [row])
    text = (tmp_path / "sweep.jsonl").read_text(encoding="utf-8")
    (tmp_path / "sweep.jsonl").write_text("\ufeff" + text + "\n", encoding="utf-8")
    assert read_sweep_rows(tmp_path) == {"runs/one": row}


def test_ctrl_c_before_the_first_step_loses_nothing(toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text_side, "text_features", pressed)
        stopped = swept(toml, tmp_path / "runs", grid=GRID[1:])
    assert stopped.stopped and [row.state for row in stopped.rows] == ["stopped"]
    done = swept(toml, tmp_path / "runs", grid=GRID[1:])
    assert done.folder == stopped.folder and len(done.finished) == 2


def test_finished_runs_are_kept_and_new_values_join_them(
    toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = swept(toml, tmp_path / "runs", grid=GRID[:1])
    trained: list[str] = []
    align = sweeping.train_recipe
    monkeypatch.setattr(
        sweeping, "train_recipe", lambda recipe, run, **o: trained.append(run.name) or align(recipe, run, **o)
    )
    assert swept(toml, tmp_path / "runs", grid=GRID[:1]) == before and not trained
    more = swept(toml, tmp_path / "runs", grid=("train.lr=1e-3,1e-2",))
    assert trained == ["lr=1e-2"] and more.folder == before.folder
    assert len(more.rows) == 2 and len(lines(more.folder / "sweep.jsonl")) == 3


@pytest.mark.parametrize("change", ["another setting", "another grid", "a caption", "a run"])
def test_no_other_runs_are_taken_for_its_own(change: str, toml: str, tmp_path: Path) -> None:
    grid, given, name = GRID[:1], [], "toy-sweep"
    if change == "a run":
        run(expand_grid(toml, [], GRID)[0].recipe, tmp_path / "runs" / name)
    else:
        swept(toml, tmp_path / "runs", grid=grid)
    if change == "another setting":
        given = ["train.seed=5"]
    elif change == "another grid":
        grid = GRID[1:]
    elif change == "a caption":
        pairs = tmp_path / "pairs" / "pairs.csv"
        pairs.write_text(pairs.read_text().replace(",a ", ",the "))
    wanted = "holds another sweep|that have changed since|holds a run, not a sweep"
    with pytest.raises(UserError, match=f"({wanted}).*; choose another name"):
        swept(toml, tmp_path / "runs", *given, grid=grid, name=name)
    if change == "a run":
        assert swept(toml, tmp_path / "runs", *given, grid=grid).folder.name == "toy-sweep-2"


def test_a_recipe_that_was_edited_makes_other_runs(toml: str, tmp_path: Path) -> None:
    swept(toml, tmp_path / "runs", grid=GRID[:1])
    Path(toml).write_text(Path(toml).read_text().replace("epochs = 2", "epochs = 3"))
    with pytest.raises(UserError, match="lr=1e-3 holds a run with other settings"):
        swept(toml, tmp_path / "runs", grid=GRID[:1], name="toy-sweep")


def test_what_auto_has_become_is_no_other_setting(toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = swept(toml, tmp_path / "runs", "train.batch_size=auto", grid=GRID[:1])
    monkeypatch.setattr(sweeping, "train_recipe", None)
    assert swept(toml, tmp_path / "runs", "train.batch_size=auto", grid=GRID[:1]) == done


def test_other_trackers_make_no_other_runs(toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = swept(toml, tmp_path / "runs", grid=GRID[:1], name="mine")
    monkeypatch.setattr(sweeping, "train_recipe", None)
    again = swept(toml, tmp_path / "runs", 'train.trackers=["toytrackers:Diary"]', grid=GRID[:1], name="mine")
    assert again.folder == done.folder and [row.value for row in again.rows] == [row.value for row in done.rows]
    with pytest.raises(UserError, match=r"with train.lr=1e-3: train.trackers: .*No module named 'nowhere'"):
        swept(toml, tmp_path / "runs", 'train.trackers=["nowhere:Name"]', grid=GRID[:1], name="other")


# --- runs that fail --------------------------------------------------------------------------------------------------


def test_a_run_that_fails_is_a_row_and_the_others_go_on(toml: str, tmp_path: Path) -> None:
    done = swept(toml, tmp_path / "runs", grid=("train.lr=1e30,1e-3",))
    assert [row.state for row in done.rows] == ["finished", "failed"] and not done.stopped
    assert "the loss is nan at step" in done.rows[1].error and done.rows[1].value is None
    assert done.cells[1][1] == "failed" and any("failed: the loss is nan" in note for note in done.notes)
    assert [row["state"] for row in lines(done.folder / "sweep.jsonl")] == ["failed", "finished"]
    assert [row.state for row in swept(toml, tmp_path / "runs", grid=("train.lr=1e30,1e-3",)).rows] == [
        "finished",
        "failed",
    ]


def test_runs_that_fail_alike_before_a_step_end_the_sweep(toml: str, tmp_path: Path) -> None:
    """Pictures that cannot be read would be read again and again."""
    for image in (tmp_path / "pairs" / "images").iterdir():
        image.write_bytes(b"no picture")
    with pytest.raises(UserError, match="images cannot be read"):
        swept(toml, tmp_path / "runs")
    assert len(lines(tmp_path / "runs" / "toy-sweep" / "sweep.jsonl")) == 2


# --- the table -------------------------------------------------------------------------------------------------------


def _row(name: str, value: float | None, low: float = 0.0) -> SweepRow:
    state = "failed" if value is None else "finished"
    interval = None if value is None else (low, 1.0)
    return SweepRow(
        name, (f"x={name}",), (f"x={name}",), state, "retrieval/mean_recall", value, interval, 0.1, 30, 1.0, ""
    )


def test_rows_without_a_number_come_last() -> None:
    rows = [_row("failed", None), _row("odd", math.nan), _row("low", 0.2), _row("high", 0.4)]
    assert [row.run for row in sorted(rows, key=ranking_key)] == ["high", "low", "odd", "failed"]


def test_the_verdict_counts_those_that_cannot_be_told_apart() -> None:
    rows = [_row("a", 0.5, low=0.35), _row("b", 0.4), _row("c", 0.3), _row("d", None)]
    lines = SweepResult(Path("runs"), rows, False, 4).summary_lines()
    assert lines[0] == "best: a; within its interval: 1 of 2 others" and "biased upwards" in lines[1]
    assert SweepResult(Path("runs"), rows[:1], False, 1).summary_lines() == ["best: a"]
    assert rows[0].cells() == ["x=a", "50.0", "35.0–100.0", "10.0", "30", "1.0"]
