"""``clasp train auto`` on toy towers: an ordinary run comes out, stages repeat, and an interrupted climb goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import clasp
from clasp.cli import train as train_verbs
from clasp.cli.train import _climb
from clasp.commands import auto as main_job
from clasp.commands import auto_closed_forms as closed_form_job
from clasp.commands.auto import AutoResult, climb, resume_climb
from clasp.commands.auto_stages import AutoCallbacks, AutoStages
from clasp.commands.closed_form import ClosedFormSearch, ClosedFormTrial, may_have_class_pairs
from clasp.commands.disk_space import plan_run_features
from clasp.commands.kept_trials import TRIALS_FILE, KeptTrials, hash_search
from clasp.commands.run_context import Preloaded
from clasp.commands.run_evaluations import RunEvaluations
from clasp.commands.step_timing import SlowStepError, _FirstBatches
from clasp.commands.train import train_recipe
from clasp.config.auto_plan import SHORT_TUNINGS, Candidate, LayerSet, Left, StepTiming, changed
from clasp.config.budget import LEAST_MINUTES, AutoSettings
from clasp.config.build import CacheFolders, build_feature_source, build_model_and_preprocessing
from clasp.config.datasets import TrainValPairs, open_training_pairs
from clasp.config.recipe import Recipe, read_recipe, recipe_from_dict
from clasp.data.pairs import Pairs
from clasp.data.readers import PairIndex
from clasp.evaluation.results import PrimaryScore
from clasp.evaluation.tasks import ScoredQueries
from clasp.report.auto_table import AutoPlan, AutoRow, auto_table
from clasp.training.cost.ledger import read_cost
from clasp.training.run_files import PLAN_FILE
from clasp.training.trackers.console import SilentReporter, TrainProgress
from clasp.types import ProgressCallback, ProgressFactory, UserError
from toyclassifiers import save_colour_classifier
from toydata import COLOURS, toys, write_csv
from toyruns import delta, run

STEPS = 40  # 7 an epoch; 5 epochs inside the towers, none for the heads alone


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def recipe(towers: Path, pairs: Path, **budget: float) -> Recipe:
    given = {
        "image": {"tower": f"file:{towers / 'image'}"},
        "text": {"tower": f"file:{towers / 'text'}"},
        "data": {"train": str(pairs), "val_fraction": 0.25},
        "train": {"precision": "float32", "seed": 1},
        "auto": budget,
    }
    return recipe_from_dict(given, "toy")


STAGES = ["2-low-rank-and-norms", "3-adapters-and-norms", "4-full", "5-closed-form-of-tuned", "6-heads"]
QUIET = AutoCallbacks(lambda line: None)


@pytest.fixture(scope="module")
def done(towers: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory, cache: None) -> AutoResult:
    return climb(recipe(towers, pairs, steps=STEPS), tmp_path_factory.mktemp("runs") / "toy", QUIET)


def test_what_comes_out_is_the_run_of_the_best_stage(done: AutoResult):
    best = done.run / "stages" / done.plan.best
    assert not done.interrupted and done.plan.finished
    saved = read_recipe(done.run / "recipe.toml")
    assert saved.auto is None and saved == read_recipe(best / "recipe.toml")
    ours, theirs = delta(done.run), delta(best)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert clasp.load(done.run).encode_text(["a red circle"]).shape[0] == 1
    card = (done.run / "README.md").read_text()
    assert card.startswith("# toy\n") and "## What was tried in 40 steps" in card and str(best) not in card


def test_every_candidate_and_stage_is_a_row_with_its_reason(done: AutoResult):
    rows = {row.stage: row for row in done.plan.rows if row.stage}
    stages = ["1-closed-form", "1-last-layers", *STAGES]
    assert list(rows) == stages
    last = read_recipe(done.run / "stages" / "2-low-rank-and-norms" / "recipe.toml")
    assert last.image.extra_layers == last.text.extra_layers == [] and (last.train.init_from or "").endswith(stages[1])
    tried = [row for row in done.plan.rows if not row.stage]
    assert len(tried) >= 8 and all(row.metric is not None and row.interval is not None for row in tried)
    assert rows["1-closed-form"].metric == pytest.approx(max(row.metric or 0 for row in tried), abs=0.1)
    assert rows["6-heads"].verdict == "left out" and "no epoch fits into the 5 steps" in rows["6-heads"].reason
    tuned = rows["2-low-rank-and-norms"]
    assert tuned.steps == 35 and tuned.change is not None and tuned.change_interval is not None
    assert tuned.verdict == ("kept" if tuned.change > 0 else "not better")
    assert rows["4-full"].verdict == "left out" and "more than the 5 steps left" in rows["4-full"].reason
    assert AutoPlan.read(done.run) == done.plan
    table = auto_table(done.plan)
    assert len(table.cells) == len(done.plan.rows) and all(len(row) == len(table.columns) for row in table.cells)


def test_the_closed_form_of_the_search_is_that_of_the_stage(done: AutoResult):
    chosen = next(row for row in done.plan.rows if row.stage == "1-closed-form")
    searched = next(row for row in done.plan.rows if not row.stage and chosen.method.endswith(f"layers {row.method}"))
    assert searched.metric == pytest.approx(chosen.metric, abs=1e-6) and searched.trained == chosen.trained


def test_the_closed_form_of_tuned_towers_keeps_the_towers(done: AutoResult):
    tuned, again = (done.run / "stages" / name for name in ("2-low-rank-and-norms", "5-closed-form-of-tuned"))
    recipe = read_recipe(again / "recipe.toml")
    assert recipe.train.epochs == 0 and recipe.train.init_parts == "towers" and recipe.train.init_from == str(tuned)
    ours, theirs = delta(again), delta(tuned)
    towers = {name for name in theirs if name.startswith(("image.", "text."))}
    assert towers and all(torch.equal(ours[name], theirs[name]) for name in towers)
    assert ours.keys() - towers == {name for name in theirs if name not in towers}
    row = done.plan.row("5-closed-form-of-tuned")
    assert row is not None and row.reason.startswith("towers of 2-low-rank-and-norms; ") and row.metric is not None
    searched = [each for each in done.plan.rows[: done.plan.rows.index(row)] if not each.stage]
    assert any(row.method == f"closed form, layers {each.method}, of the tuned towers" for each in searched)


@pytest.mark.parametrize("stage", ["1-closed-form", "2-low-rank-and-norms", "5-closed-form-of-tuned"])
def test_the_recipe_of_a_stage_repeats_its_weights(stage: str, done: AutoResult, tmp_path: Path):
    folder = done.run / "stages" / stage
    run(read_recipe(folder / "recipe.toml"), tmp_path / "again")
    ours, theirs = delta(folder), delta(tmp_path / "again")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], set[int]]:
    """The candidates that were scored, and after how many of them to interrupt."""
    scored, stops, score = list[str](), set[int](), ClosedFormSearch._try

    def count(search: ClosedFormSearch, candidate: Candidate) -> ClosedFormTrial:
        if len(scored) in stops:
            stops.remove(len(scored))
            raise KeyboardInterrupt
        scored.append(str(candidate))
        return score(search, candidate)

    monkeypatch.setattr(ClosedFormSearch, "_try", count)
    return scored, stops


def test_an_interrupted_climb_keeps_the_best_and_goes_on(
    done: AutoResult,
    towers: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tried: tuple[list[str], set[int]],
):
    class Stops(SilentReporter):
        def step(self, progress: TrainProgress) -> None:
            if progress.step == 10:
                reserved.append(AutoPlan.read(tmp_path / "toy").reserved_seconds)
                os.kill(os.getpid(), signal.SIGINT)

    reserved: list[float] = []
    stopping = AutoCallbacks(lambda line: None, reporter=Stops)
    scored, stops = tried
    frozen = [row.stage for row in done.plan.rows].index("1-closed-form")
    stops |= {3, frozen + 1}  # in the search of the frozen towers, and in that of the tuned ones
    assert climb(recipe(towers, pairs, steps=STEPS), tmp_path / "toy", QUIET).interrupted and len(scored) == 3
    stopped = resume_climb(tmp_path / "toy", stopping)
    assert (
        len(scored) == frozen
        and stopped.interrupted
        and stopped.plan.best == "1-closed-form"
        and not stopped.plan.finished
    )
    assert reserved[0] == stopped.plan.reserved_seconds > 0, "on disk, whenever the stage is killed"
    assert clasp.load(tmp_path / "toy").encode_text(["a red circle"]).shape[0] == 1
    with pytest.raises(UserError, match=r"holds a climb already; go on with: clasp resume"):
        climb(recipe(towers, pairs, steps=STEPS), tmp_path / "toy", QUIET)
    first = (tmp_path / "toy" / "stages" / "1-closed-form" / "delta.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch, pytest.raises(UserError, match="have changed since 1-closed-form"):
        train, val = open_training_pairs(recipe(towers, pairs, steps=STEPS))
        patch.setattr(main_job, "open_training_pairs", lambda recipe: (train[1:], val))
        resume_climb(tmp_path / "toy", QUIET)
    assert resume_climb(tmp_path / "toy", QUIET).interrupted and len(scored) == frozen + 1
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shutil, "copyfile", _killed_at_the_weights)
        resume_climb(tmp_path / "toy", QUIET)
    with pytest.raises(UserError, match="was never trained"):
        clasp.load(tmp_path / "toy")
    resumed = resume_climb(tmp_path / "toy", QUIET)
    assert not resumed.interrupted and resumed.plan.best == done.plan.best
    assert (tmp_path / "toy" / "stages" / "1-closed-form" / "delta.safetensors").stat().st_mtime_ns == first
    ours, theirs = delta(tmp_path / "toy"), delta(done.run)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    candidates, uninterrupted = (
        [replace(row, seconds=0.0) for row in each.plan.rows if not row.stage] for each in (resumed, done)
    )
    assert candidates == uninterrupted and scored == [row.method for row in candidates], "each was scored once"
    for stage in ("1-closed-form", "5-closed-form-of-tuned"):
        ours, theirs = (delta(each / "stages" / stage) for each in (tmp_path / "toy", done.run))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert not (tmp_path / "toy" / TRIALS_FILE).exists(), "its rows are in the plan"
    with pytest.raises(UserError, match="is finished"):
        resume_climb(tmp_path / "toy", QUIET)


@pytest.mark.parametrize("change", ["recipe", "validation", "features", "captions", ""])
def test_trials_of_another_search_are_not_taken(change: str, towers: Path, pairs: Path, tmp_path: Path):
    given = changed(recipe(towers, pairs, steps=STEPS), {"tune": {"image": ["none"], "text": ["none"]}})
    opened, val = open_training_pairs(given)
    rows = list(opened)
    train = Pairs(opened.name, [rows])
    first, second = rows[0], next(row for row in rows if row.captions != rows[0].captions)
    swapped = {first.id: second.captions, second.id: first.captions}
    parts = build_model_and_preprocessing(given)

    def hash_of(given: Recipe, train: Pairs, val: Pairs) -> str:
        return hash_search(given, build_feature_source(parts, given).batch_reader(train, PairIndex(train), None), val)

    trial = ClosedFormTrial(
        Candidate(LayerSet("last", ()), LayerSet("é", (1, 2)), (0.1, 1.0), 8),
        PrimaryScore(1 / 3, torch.tensor([0.1, float("nan"), 2 / 3], dtype=torch.float64)),
        8,
        0.1,
    )
    before = hash_of(given, train, val)
    KeptTrials(tmp_path, before, lambda: None).add(trial)
    other = changed(given, {"head": {"width": 8}}) if change == "recipe" else given
    other_train = {
        "features": train[1:],
        "captions": Pairs(train.name, [[replace(row, captions=swapped.get(row.id, row.captions)) for row in rows]]),
    }
    now = hash_of(other, other_train.get(change, train), val[1:] if change == "validation" else val)
    found = KeptTrials(tmp_path, now, lambda: None).find(trial.candidate)
    assert (found is None) == (change != "") == (now != before)
    if found is not None:
        assert (found.score.value, found.delta_bytes) == (trial.score.value, 8)
        assert torch.equal(found.score.replicates.nan_to_num(7), trial.score.replicates.nan_to_num(7))


@pytest.mark.parametrize("at", ["are cached; ", ": kept, "])
def test_nothing_is_written_into_a_folder_in_place_of_a_moved_one(
    at: str, towers: Path, pairs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "toy"

    def move(line: str) -> None:
        if at in line:
            folder.rename(tmp_path / "moved")
            folder.mkdir()

    with pytest.raises(UserError, match="toy was moved, deleted or replaced"):
        climb(recipe(towers, pairs, steps=STEPS), folder, AutoCallbacks(move))
    assert not list(folder.iterdir())
    plan = tmp_path / "moved" / PLAN_FILE
    plan.write_text(plan.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert AutoPlan.read(tmp_path / "moved").recipe, "as an editor saves it"


def test_the_plan_in_place_of_a_moved_one_is_left_alone(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "toy"

    def fail(climbing: object) -> None:
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        if there:
            (folder / PLAN_FILE).write_text("another's")
        raise UserError("the reason")

    monkeypatch.setattr("clasp.commands.auto._Climb.run", fail)
    for there in (True, False):
        with pytest.raises(UserError, match="the reason"):
            climb(recipe(towers, pairs, steps=STEPS), folder, QUIET)
        assert (folder / PLAN_FILE).exists() == there
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "moved")


def test_stopped_at_once_before_and_after_the_stages(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    given = recipe(towers, pairs, minutes=1e-4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AutoStages, "__init__", stop)
        _climb(given, tmp_path / "toy")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(AutoStages, "publish", stop)
        _climb(given, tmp_path / "toy")  # of the same name: nothing was left
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 130 and "stopped at once; go on with: clasp resume" in said
    assert not resume_climb(tmp_path / "toy", QUIET).interrupted and (tmp_path / "toy" / "delta.safetensors").exists()


def _killed_at_the_weights(source: str | Path, to: str | Path, **settings: bool) -> None:
    if Path(source).name == "delta.safetensors":
        raise SystemExit("no power")
    Path(to).write_bytes(Path(source).read_bytes())


def test_a_budget_too_small_for_anything_gives_the_closed_form(towers: Path, pairs: Path, tmp_path: Path):
    said: list[str] = []
    done = climb(recipe(towers, pairs, minutes=1e-4), tmp_path / "toy", AutoCallbacks(said.append))
    assert done.plan.best == "1-closed-form" and (tmp_path / "toy" / "delta.safetensors").exists()
    assert any("the budget of 0.0001 minutes ended before it" in line for line in said)
    assert said[0].startswith(
        "budget: 0.0001 minutes in all; features of all pairs and heads in closed form are finished"
    )
    assert said[1].startswith("warning: few validation pairs (")
    assert [row.verdict for row in done.plan.rows if row.stage][1:] == ["left out"] * 5


def test_nothing_follows_a_stage_that_cannot_be_beaten(towers: Path, pairs: Path, tmp_path: Path):
    given = recipe(towers, pairs, steps=STEPS).to_dict()
    given["data"]["val_fraction"] = 1e-6
    done = climb(recipe_from_dict(given, "toy"), tmp_path / "toy", QUIET)
    stages = [row for row in done.plan.rows if row.stage]
    assert [row.verdict for row in stages] == ["kept"] + ["left out"] * 5
    assert len({row.reason for row in stages[1:]}) == 1
    assert stages[1].reason.startswith("1-closed-form has 100 % on validation (1 pair), and nothing can be better")


@pytest.mark.parametrize(
    ("classes", "count", "said"),
    [(["dog"], 20, "at least two classes; there is only dog"), (["dog", "cat"], 2, "two pairs to tell apart")],
)
def test_pairs_that_nothing_can_be_trained_on_are_one_line_before_any_compute(
    classes: list[str], count: int, said: str, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(closed_form_job, "begin_search", lambda *_: pytest.fail("computed features"))
    for number in range(count):
        (folder := tmp_path / "data" / classes[number % len(classes)]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    with pytest.raises(UserError, match=re.escape(said)):
        climb(recipe(towers, tmp_path / "data", steps=STEPS), tmp_path / "toy", QUIET)
    assert not (tmp_path / "toy").exists()


def test_few_pairs_beside_class_pairs_take_the_last_layers(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(closed_form_job, "may_have_class_pairs", lambda recipe: True)
    done = climb(recipe(towers, pairs, minutes=1e-4), tmp_path / "toy", QUIET)
    tried = [row.method for row in done.plan.rows if not row.stage]
    assert tried and all(method.startswith("last, ") for method in tried)


def test_without_class_pairs_is_tried_whatever_the_time(towers: Path, tmp_path: Path):
    save_colour_classifier(tmp_path / "image", toys(90, seed=1), list(COLOURS))
    given = recipe(towers, write_csv(toys(60), tmp_path), minutes=1e-4).to_dict()
    given["image"]["tower"] = f"file:{tmp_path / 'image'}"
    done = climb(recipe_from_dict(given, "toy"), tmp_path / "toy", QUIET)
    *first, alone = [row.method for row in done.plan.rows if not row.stage]
    assert first and all(method.endswith(", class pairs 10") for method in first)
    assert f"{alone}, class pairs 10" in first


def test_the_least_time_is_said_alike():
    words = f"bout {LEAST_MINUTES:g} minutes are needed on two cores"
    assert words in AutoSettings(minutes=LEAST_MINUTES / 2).announcement
    for file in ("docs/tuning.md", "src/clasp/cli/train.py"):
        assert words in (Path(__file__).parents[2] / file).read_text(encoding="utf-8")


def test_nothing_follows_few_pairs_that_cannot_be_beaten(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(closed_form_job, "few_pairs", lambda minutes, count: 20)
    given = recipe(towers, pairs, steps=STEPS).to_dict()
    given["data"]["val_fraction"] = 1e-6
    done = climb(recipe_from_dict(given, "toy"), tmp_path / "toy", QUIET)
    assert [row.stage for row in done.plan.rows if row.stage and row.verdict != "left out"] == ["1-closed-form"]


def test_nothing_follows_tuning_that_cannot_be_beaten(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(main_job._Climb, "_unbeatable", lambda self: "it has 100 %" if self._first_tuning() else "")
    done = climb(recipe(towers, pairs, steps=STEPS), tmp_path / "toy", QUIET)
    left_out = {row.stage: row.reason for row in done.plan.rows if row.verdict == "left out"}
    assert left_out == dict.fromkeys(STAGES[1:], "it has 100 %")


@pytest.mark.parametrize(
    ("overrides", "may"),
    [([], True), (["data.class_weight=0"], False), (["image.tower=pip:dinov2-small-focus"], False)],
)
def test_which_towers_may_have_class_pairs(overrides: list[str], may: bool):
    assert may_have_class_pairs(read_recipe("auto", ["data.train=none.csv", *overrides])) is may


def test_the_start_of_tuning_is_not_made_where_no_step_fits(towers: Path, pairs: Path, tmp_path: Path):
    done = climb(recipe(towers, pairs, steps=3), tmp_path / "toy", QUIET)
    rows = {row.stage: row.verdict for row in done.plan.rows if row.stage}
    assert list(rows) == ["1-closed-form", *STAGES] and set(rows.values()) == {"kept", "left out"}


def test_little_time_for_many_pairs_starts_from_few(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(closed_form_job, "few_pairs", lambda minutes, count: 20)
    short = (replace(SHORT_TUNINGS[0], batch_size=6), *SHORT_TUNINGS[1:])
    monkeypatch.setattr(main_job, "tunings_in", lambda minutes, count: short)
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    events: list[str] = []

    @contextmanager
    def computed(title: str) -> Iterator[ProgressCallback]:
        yield lambda done, total: events.append(title)

    done = climb(recipe(towers, pairs, steps=9), tmp_path / "toy", AutoCallbacks(events.append, bar=computed))
    rows = [row for row in done.plan.rows if row.stage]
    stages = [row.stage for row in rows]
    tuning = next(place for place, event in enumerate(events) if event.startswith(stages[1]))
    captions = [place for place, event in enumerate(events) if event.startswith("captions through")]
    assert captions and max(captions) < tuning, "all layers of captions are computed before the last is read"
    assert stages == ["1-closed-form", "2-low-rank-and-norms-of-images", *STAGES[1:]]
    assert rows[0].method.endswith(", of at most 20 pairs") and "to tune the towers from" in rows[0].reason
    first, tuned, again = (read_recipe(tmp_path / "toy" / "stages" / stages[n] / "recipe.toml") for n in (0, 1, 4))
    assert first.data.max_pairs == 20 and first.image.extra_layers == []
    assert tuned.tune.text == ["none"] and "lora(rank=8)" in tuned.tune.image and tuned.train.max_steps == 9
    assert tuned.train.batch_size == 6
    assert tuned.data.max_pairs is again.data.max_pairs is None and again.image.extra_layers
    run(first, tmp_path / "again")
    ours, theirs = delta(tmp_path / "toy" / "stages" / "1-closed-form"), delta(tmp_path / "again")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_features_of_tuned_towers_are_cached_apart(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "usual"))
    given = changed(recipe(towers, pairs, steps=1), {"tune": {"image": ["norms"]}})
    parts = build_model_and_preprocessing(given)
    parts.model.freeze()
    train, val = open_training_pairs(given)
    inputs = build_feature_source(parts, given, folders=CacheFolders(tuned=tmp_path / "tuned"))
    assert inputs.image_features(train) is not None
    images = plan_run_features(given, inputs, train, val, PairIndex(train))[0]
    assert images.file is not None and images.file.is_relative_to(tmp_path / "tuned"), "planned where it is cached"
    assert [len(list((tmp_path / name).glob("features/*.npy"))) for name in ("tuned", "usual")] == [1, 0]
    assert inputs.text_features(PairIndex(train).texts) is not None
    assert [len(list((tmp_path / name).glob("features/*.npy"))) for name in ("tuned", "usual")] == [1, 1]


def test_a_resumed_closed_form_of_tuned_towers_reads_their_features(
    done: AutoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopped(evaluations: RunEvaluations) -> list[ScoredQueries]:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(evaluations)

    evaluate = RunEvaluations._evaluate
    given = read_recipe(done.run / "stages" / "5-closed-form-of-tuned" / "recipe.toml")
    start = partial(train_recipe, given, tmp_path / "run", say=lambda line: None)
    with monkeypatch.context() as patch:
        patch.setattr(RunEvaluations, "_evaluate", stopped)
        assert start(preloaded=Preloaded(tuned=tmp_path / "first")).fitted.interrupted
    start(preloaded=Preloaded(tuned=tmp_path / "second"), resume=True)
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "features").glob("*.npy")}
        for name in ("first", "second")
    )
    assert len(first) == 4 and first == second, "images and captions, of training and validation"


@pytest.mark.parametrize("refused", ["", "the part has one class", "it cannot be scored"])
def test_an_evaluation_is_timed_on_a_part_where_that_can_be_scored(
    refused: str, towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    timed: list[int] = []

    def time_steps(recipe: Recipe, pairs: TrainValPairs, bar: ProgressFactory, *, left: float) -> StepTiming:
        assert left == float("inf"), "a budget in steps"
        timed.append(len(pairs[1]))
        if refused == "it cannot be scored" and timed == [4]:
            raise UserError(refused)
        return StepTiming(1.0, 2.0, 7)

    def require_validation(train: Pairs, val: Pairs) -> None:
        if refused == "the part has one class":
            raise UserError(refused)

    given = recipe(towers, pairs, steps=STEPS)
    opened = open_training_pairs(given)
    climbing = main_job._Climb(given, tmp_path / "toy", AutoPlan({}), opened, QUIET, lambda: None)
    monkeypatch.setattr(main_job, "_TIMED_VALIDATION", 4)
    monkeypatch.setattr(main_job, "time_steps", time_steps)
    monkeypatch.setattr(main_job, "require_validation", require_validation)
    evaluation, whole = climbing._time_steps(given).evaluation, len(opened[1])
    assert evaluation == (2.0 if refused else 2.0 * whole / 4)
    assert timed == {"": [4], "the part has one class": [whole], "it cannot be scored": [4, whole]}[refused]


def test_no_step_is_timed_where_features_of_all_pairs_do_not_fit(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(closed_form_job, "few_pairs", lambda minutes, count: 20)
    monkeypatch.setattr(AutoStages, "left", Left(1e-6, None))
    monkeypatch.setattr(main_job._Climb, "_time_steps", lambda *given: pytest.fail("timed steps"))
    done = climb(recipe(towers, pairs, minutes=1), tmp_path / "toy", QUIET)
    tuned = done.plan.row("2-low-rank-and-norms")
    assert tuned is not None and re.fullmatch(
        r"features of all pairs, about \d+ s, and the steps .* do not fit into .*", tuned.reason
    )
    assert AutoPlan.read(tmp_path / "toy").seconds_of_features > 0, "on disk, for a session that resumes it"


@pytest.mark.parametrize(
    ("captions", "left", "timed"),
    [  # features of 20 pairs take 20 s, a step of 5 pairs 15 s, and 13 steps 195 s
        (1, Left(214.0, None), False),
        (1, Left(216.0, None), True),
        (5, Left(58.0, None), False),
        (5, Left(60.0, None), True),
        (1, Left(None, 5), True),
    ],
)
def test_steps_are_timed_where_features_leave_time_for_them(
    captions: int, left: Left, timed: bool, towers: Path, pairs: Path, tmp_path: Path
):
    given, plan = recipe(towers, pairs, minutes=1), AutoPlan({}, seconds_of_features=20.0)
    train, val = open_training_pairs(given)
    many = [replace(pair, captions=pair.captions[:1] * captions) for pair in train.subset(range(20))]
    climbing = main_job._Climb(given, tmp_path / "toy", plan, (train, val), QUIET, lambda: None)
    climbing._closed_forms.pairs = many, val  # pyright: ignore[reportAttributeAccessIssue]
    assert (climbing._closed_forms.reason_against_steps(left) == "") is timed


@pytest.mark.parametrize(
    ("minutes", "count", "layers"),
    [(1.0, 729, "last"), (1.5, 729, "upper half"), (1.0, 1024, "upper half"), (3.0, 729, "all"), (None, 729, "all")],
)
def test_the_layers_of_a_search_are_by_minutes_and_pairs(
    minutes: float | None, count: int, layers: str, towers: Path, pairs: Path, tmp_path: Path
):
    given = recipe(towers, pairs, minutes=minutes) if minutes else recipe(towers, pairs, steps=STEPS)
    train, val = open_training_pairs(given)
    many = (train.subset(row % len(train) for row in range(count)), val)
    climbing = main_job._Climb(given, tmp_path / "toy", AutoPlan({}), many, QUIET, lambda: None)
    assert climbing._closed_forms._layers == layers


class FourBatches:
    """The batches of an epoch of four steps."""

    def __len__(self) -> int:
        return 4

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        return iter(range(4))


@pytest.mark.parametrize(("left", "steps"), [(1e-9, 1), (2.0, 3), (float("inf"), 4)])
def test_no_more_steps_are_timed_once_one_says_that_too_few_fit(
    left: float, steps: int, monkeypatch: pytest.MonkeyPatch
):
    clock = iter([0.0, 1.0, 1.1, 2.1, 2.2])  # the first takes 1 s, as the third; all 4 have to fit
    monkeypatch.setattr("clasp.commands.step_timing.time.perf_counter", lambda: next(clock))
    few, taken = _FirstBatches(FourBatches(), left), 0
    with pytest.raises(SlowStepError) if steps < 4 else nullcontext():
        for _ in few.epoch(1):
            taken += 1
    assert taken == steps


def test_slow_steps_leave_the_time_to_heads(towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clasp.commands.step_timing.FEWEST_STEPS", 10**6)
    monkeypatch.setattr("clasp.commands.step_timing._OF_FIRST", 1e-6)
    done = climb(recipe(towers, pairs, minutes=1), tmp_path / "toy", QUIET)
    tuned, heads = done.plan.row("2-low-rank-and-norms"), done.plan.row("6-heads")
    assert tuned is not None and re.fullmatch(r"a step takes .* s: fewer than \d+ fit into the .*", tuned.reason)
    assert heads is not None and heads.metric is not None


def test_all_pairs_follow_where_no_step_fits(
    towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(closed_form_job, "few_pairs", lambda minutes, count: 20)
    done = climb(recipe(towers, pairs, minutes=1e-4), tmp_path / "toy", QUIET)
    rows = {row.stage: row.verdict for row in done.plan.rows if row.stage}
    assert list(rows)[-2:] == ["1-closed-form-of-all-pairs", "6-heads"] and len(rows) == 7
    assert (
        read_recipe(tmp_path / "toy" / "stages" / "1-closed-form-of-all-pairs" / "recipe.toml").data.max_pairs is None
    )


def test_the_cost_is_that_of_all_stages(done: AutoResult):
    whole, kept = read_cost(done.run), read_cost(done.run / "stages" / done.plan.best)
    assert sum(session.steps for session in whole.sessions) == 35 > 0 and whole.work is not None
    assert sum(whole.seconds.values()) == pytest.approx(done.plan.seconds, rel=0.2)
    assert whole.parameters == kept.parameters and whole.delta_bytes == kept.delta_bytes
    card = (done.run / "README.md").read_text()
    assert f"| cost | all stages | {done.plan.best} |" in card and "between stages" in card


def test_features_are_cached_once(towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cached = {}
    for attention in ("fused", "plain"):
        monkeypatch.setenv("CLASP_CACHE", str(tmp_path / attention))
        given = recipe(towers, pairs, minutes=1e-4).to_dict()
        given["train"]["attention"] = attention
        climb(recipe_from_dict(given, "toy"), tmp_path / f"run-{attention}", QUIET)
        cached[attention] = len(list((tmp_path / attention / "features").glob("*.npy")))
    assert cached["plain"] == cached["fused"] > 0, "the search and its stages attend alike"


def test_interrupted_before_a_stage_ended(towers: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*given: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(closed_form_job, "begin_search", stop)
    done = climb(recipe(towers, pairs, steps=STEPS), tmp_path / "toy", QUIET)
    assert done.interrupted and not done.plan.best and not (tmp_path / "toy" / "recipe.toml").exists()
    assert json.loads((tmp_path / "toy" / "plan.json").read_text())["recipe"]["auto"] == {"steps": STEPS}
    with pytest.raises(AssertionError, match=r"commands\.auto"):
        train_recipe(recipe(towers, pairs, steps=STEPS), tmp_path / "other", say=lambda line: None)


def test_what_was_tried_before_a_first_stage_ended_is_said_to_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tried = AutoPlan({}, primary="retrieval/recall@1", rows=[AutoRow(method="heads", verdict="tried", metric=0.5)])
    monkeypatch.setattr(main_job, "resume_climb", lambda run, callbacks: AutoResult(run, tried, True))
    with pytest.raises(SystemExit) as end:
        train_verbs._climb(None, tmp_path / "toy")
    said = " ".join(capsys.readouterr().err.split())
    assert end.value.code == 130 and "no stage had ended; heads that were tried are not tried again" in said
