"""``clasp train auto``: from a closed form on cached features to tuning inside the towers, within a budget.

Input: a recipe with ``[auto]``, and a folder. Output: an ordinary run, that of the best stage; the stages are runs too,
in ``RUN/stages``. The heads are chosen in closed form (``commands.closed_form``), then both towers are tuned; heads
take gradient steps with what is left of the budget. A stage is kept where the run's own validation metric is better.
Note: Ctrl-C ends it with the best stage so far; ``plan.json`` has what was tried and is what ``clasp resume`` goes on
from. Finished stages are not repeated. One class of many lines: its stages share the budget, the plan and the best
score.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState

from clasp.commands.closed_form import begin_search, choose_trial, search_recipe, with_layer_pools
from clasp.commands.run_context import Preloaded
from clasp.commands.step_timing import time_steps
from clasp.commands.train import train_recipe
from clasp.config.auto_plan import (
    CLOSED_FORM_STAGE,
    TUNINGS,
    Left,
    StagePlan,
    TowerTuning,
    changed,
    fit_heads,
    fit_tuning,
    plan_closed_form,
    plan_heads,
    plan_last_layers,
    plan_tuning,
)
from clasp.config.build import (
    ModelAndPreprocessing,
    build_feature_source,
    build_model,
    build_model_and_preprocessing,
    load,
)
from clasp.config.datasets import TrainValPairs, open_training_pairs
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.data.atomic_files import read_json_lines, replace_file
from clasp.data.folder_lock import lock_folder
from clasp.data.readers import PairIndex
from clasp.evaluation.from_pairs import validation_task
from clasp.evaluation.results import PrimaryScore
from clasp.models.dual_encoder import DualEncoder
from clasp.report.auto_table import PLAN_FILE, AutoPlan, AutoRow, auto_table
from clasp.report.model_card import markdown_table
from clasp.training.closed_form_heads import ClosedFormHeads
from clasp.training.cost import COST_FILE
from clasp.training.run_code import all_code_names, allow_code, require_allowed
from clasp.training.run_folder import RunFolder
from clasp.training.trackers.console import Reporter, SilentReporter
from clasp.types import MessageCallback, ProgressFactory, UserError, no_progress_bar

_SEARCH_SHARE = 0.2  # of the minutes, for comparing closed forms once the features are cached
_MIN_SEARCH_SECONDS = 30.0  # or half the minutes: in so little time no epoch of tuning fits
_RUN_FILES = ("base.json", "transform.json", "log.jsonl", "results.jsonl", COST_FILE, "recipe.toml")


@dataclass(frozen=True, slots=True)
class AutoResult:
    """What a climb left: the plan with its rows, and whether it was interrupted."""

    run: Path
    plan: AutoPlan
    interrupted: bool


@dataclass(frozen=True, slots=True)
class AutoCallbacks:
    """Where a climb reports: lines, progress bars, and a new reporter for each stage."""

    say: MessageCallback
    bar: ProgressFactory = no_progress_bar
    reporter: Callable[[], Reporter] = SilentReporter


def climb(recipe: Recipe, run: Path, callbacks: AutoCallbacks) -> AutoResult:
    """Spend the budget of ``recipe.auto`` on a new run. Raises ``UserError`` before any compute where it can."""
    assert recipe.auto is not None
    if (run / PLAN_FILE).exists():
        raise UserError(
            f"{run} holds a climb already; go on with: clasp resume {run}; or choose another name with --name"
        )
    RunFolder(run).require_free()
    pairs = open_training_pairs(recipe)
    build_model(changed(recipe, {}), meta=True)
    with lock_folder(run):
        plan = AutoPlan(recipe.to_dict())
        plan.write(run)
        with allow_code(all_code_names(plan.recipe).values()):  # the stages name what the recipe names
            return _Climb(recipe, run, plan, pairs, callbacks).run()


def resume_climb(run: Path, callbacks: AutoCallbacks) -> AutoResult:
    """Go on with an interrupted climb; the stages that ended are kept."""
    plan = AutoPlan.read(run)
    if plan.finished:
        raise UserError(f"{run} is finished: nothing is left to resume")
    require_allowed(all_code_names(plan.recipe), run)
    recipe = recipe_from_dict(plan.recipe, str(run / PLAN_FILE))
    with lock_folder(run), allow_code(all_code_names(plan.recipe).values()):
        return _Climb(recipe, run, plan, open_training_pairs(recipe), callbacks).run()


class _Climb:
    """One session of a climb."""

    def __init__(self, recipe: Recipe, run: Path, plan: AutoPlan, pairs: TrainValPairs, callbacks: AutoCallbacks):
        assert recipe.auto is not None
        self.budget, self.base = recipe.auto, with_layer_pools(recipe)
        self.folder, self.stages, self.plan, self.pairs, self.io = run, run / "stages", plan, pairs, callbacks
        self._began, self._earlier = time.monotonic(), plan.seconds
        self._best_score: PrimaryScore | None = None

    def run(self) -> AutoResult:
        interrupted = False
        try:
            self._closed_form()
            for method in TUNINGS:
                self._tuning(method)
            self._heads()
            self.plan.finished = True
        except KeyboardInterrupt:
            interrupted = True
        self._write()
        if self.plan.best:
            self._publish()
        return AutoResult(self.folder, self.plan, interrupted)

    # --- the budget --------------------------------------------------------------------------------------------------

    @property
    def _seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began

    @property
    def _left(self) -> Left:
        if self.budget.steps is not None:
            return Left(None, max(0, self.budget.steps - sum(row.steps for row in self.plan.rows)))
        assert self.budget.minutes is not None
        return Left(60 * self.budget.minutes - self._seconds, None)

    def _write(self) -> None:
        self.plan.seconds = self._seconds
        self.plan.write(self.folder)

    # --- the stages --------------------------------------------------------------------------------------------------

    def _closed_form(self) -> None:
        """Stage 1: the heads in closed form that validation chooses."""
        if self.plan.row(CLOSED_FORM_STAGE) is not None:
            return
        self.plan.rows.clear()  # candidates of a search that was interrupted
        stage, heads = self._search()
        if (left := self._left.seconds) is not None and left < 0:
            stage = replace(stage, reason=f"{stage.reason}; the budget of {self.budget} ended before it")
        self._train(stage, heads)

    def _search(self) -> tuple[StagePlan, ClosedFormHeads]:
        """The closed form that validation chooses, and its heads."""
        train = self.pairs[0]
        recipe = search_recipe(self.base)
        parts = build_model_and_preprocessing(recipe, lambda: PairIndex(train).texts)
        parts.model.to(PartialState().device).eval()
        inputs = build_feature_source(parts, recipe, bar=self.io.bar, say=self.io.say)
        sides = inputs.batch_reader(train, PairIndex(train), None)
        task = validation_task(*self.pairs, inputs)
        self.plan.primary = task.primary
        began = time.monotonic()
        self.io.say(f"features of all layers are cached; {self._seconds:,.0f} s so far")
        seconds = float("inf") if self.budget.minutes is None else 60 * self.budget.minutes
        share = max(_SEARCH_SHARE * seconds, min(_MIN_SEARCH_SECONDS, seconds / 2))
        search = begin_search(parts.model, recipe, sides, task, inputs)
        trials = search.run(self.io.say, lambda: time.monotonic() - began > share)
        chosen, reason = choose_trial(trials)
        for trial in trials:
            row = AutoRow(method=str(trial.candidate), verdict="tried", seconds=trial.seconds)
            row = replace(row, metric=trial.score.value, interval=tuple(trial.score.interval))
            self.plan.rows.append(replace(row, trained=trial.delta_bytes // 4))
        return plan_closed_form(self.base, chosen.candidate, reason), search.heads(chosen.candidate)

    def _heads(self) -> None:
        """The last stage: gradient steps of the heads on cached features, where tuning left time."""
        number = 2 + len(TUNINGS)
        stage = plan_heads(self._base(CLOSED_FORM_STAGE), number, str(self.stages / CLOSED_FORM_STAGE))
        if self._resumes_or_ended(stage):
            return
        if self._left.nothing:
            return self._leave_out(stage, f"the budget of {self.budget} has ended")
        timing = time_steps(stage.recipe, self.pairs, self.io.bar)
        self._train_if_planned(stage, fit_heads(stage, timing, self._left))

    def _tuning(self, method: TowerTuning) -> None:
        """Stage 2 and on: tuning inside the towers, from heads of the last layers."""
        number, start = 2 + TUNINGS.index(method), self._start_of_tuning()
        base = self._base(start)
        stage = plan_tuning(base, number, str(self.stages / start), method, self._specs(method, base))
        if self._resumes_or_ended(stage):
            return
        if self._left.nothing:
            return self._leave_out(stage, f"the budget of {self.budget} has ended")
        # a further method starts anew, so it must have the time of the first
        first = self._first_tuning()
        if first is not None:
            left = self._left
            if first.metric is None:
                return self._leave_out(stage, f"as {first.stage}")
            if (left.seconds or 0) < first.seconds and (left.steps or 0) < first.steps:
                return self._leave_out(stage, f"{first.stage} took more than {left}")
        timing = time_steps(stage.recipe, self.pairs, self.io.bar)
        self._train_if_planned(stage, fit_tuning(stage, timing, self._left))

    def _base(self, start: str) -> Recipe:
        """The user's recipe with the layers and heads of a stage; its batch size is still "auto" where it was."""
        made = RunFolder(self.stages / start).recipe()
        layers = {side: {"extra_layers": made[side]["extra_layers"]} for side in ("image", "text")}
        return changed(self.base, {**layers, "head": made["head"]})

    def _start_of_tuning(self) -> str:
        """The stage that tuning starts from; the closed form of the last layers is made here where it was not."""
        closed_form = recipe_from_dict(RunFolder(self.stages / CLOSED_FORM_STAGE).recipe(), CLOSED_FORM_STAGE)
        last = plan_last_layers(closed_form)
        if last is None:
            return CLOSED_FORM_STAGE
        if self.plan.row(last.name) is None and not self._left.nothing:
            self._train(last)
        return last.name if self.plan.row(last.name) is not None else CLOSED_FORM_STAGE

    def _first_tuning(self) -> AutoRow | None:
        return next((row for row in self.plan.rows if row.stage.startswith("2-")), None)

    def _specs(self, method: TowerTuning, base: Recipe) -> dict[str, list[str]]:
        """What each tower takes of the method: where one of its parts does not fit a net, the other parts."""
        specs = {}
        for side in ("image", "text"):
            for chosen in (list(method.specs), list(method.specs[1:]), list(method.specs[:1])):
                try:
                    build_model(changed(base, {"tune": {side: chosen}}), meta=True)
                except UserError:
                    continue
                specs[side] = chosen
                break
        return specs

    # --- one stage ---------------------------------------------------------------------------------------------------

    def _resumes_or_ended(self, stage: StagePlan) -> bool:
        """Whether the stage has ended; one that was interrupted is finished first."""
        if self.plan.row(stage.name) is not None:
            return True
        if not RunFolder(self.stages / stage.name).has_state:
            return False
        recipe = recipe_from_dict(RunFolder(self.stages / stage.name).recipe(), stage.name)
        self._train(replace(stage, recipe=recipe, reason="resumed"))
        return True

    def _train_if_planned(self, stage: StagePlan, planned: StagePlan | str) -> None:
        if isinstance(planned, str):
            return self._leave_out(stage, planned)
        self._train(planned)

    def _leave_out(self, stage: StagePlan, reason: str) -> None:
        self.io.say(f"{stage.name}: left out, {reason}")
        self.plan.rows.append(AutoRow(stage=stage.name, method=stage.method, reason=reason, verdict="left out"))
        self._write()

    def _train(self, stage: StagePlan, heads: ClosedFormHeads | None = None) -> None:
        """Train or resume a stage, compare it with the best before, and record it."""
        self.io.say(f"{stage.name}: {stage.method}: {stage.reason}")
        folder, began = self.stages / stage.name, time.monotonic()
        resume = RunFolder(folder).has_state
        shared = Preloaded(pairs=self.pairs, heads=heads)
        io = self.io
        if resume or not (folder / "delta.safetensors").exists():
            done = train_recipe(
                stage.recipe, folder, say=io.say, bar=io.bar, reporter=io.reporter(), resume=resume, preloaded=shared
            )
            if done.fitted.interrupted:
                raise KeyboardInterrupt
        score, trained = self._score(stage.name)
        row = AutoRow(stage=stage.name, method=stage.method, reason=stage.reason, verdict="kept")
        row = replace(row, metric=score.value, interval=tuple(score.interval), trained=trained)
        row = replace(row, seconds=time.monotonic() - began, steps=_steps(folder))
        if self.plan.best:
            best = self._best_score or self._score(self.plan.best)[0]
            change = score.change_from(best)
            row = replace(row, change=change.value, change_interval=tuple(change.interval))
            row = replace(row, verdict="kept" if change.value > 0 else "not better")
        if row.verdict == "kept":
            self.plan.best, self._best_score = stage.name, score
        self.io.say(_verdict_line(row, self.plan.primary))
        self.plan.rows.append(row)
        self._write()

    def _score(self, name: str) -> tuple[PrimaryScore, int]:
        """The validation score of a stage with its replicates, and its count of trained parameters."""
        model = load(self.stages / name, device=str(PartialState().device))
        assert isinstance(model.encoder, DualEncoder)
        recipe = recipe_from_dict(RunFolder(self.stages / name).recipe(), name)
        parts = ModelAndPreprocessing(model.encoder, model.transform, model.tokenizer)
        inputs = build_feature_source(parts, recipe, bar=self.io.bar)
        task = validation_task(*self.pairs, inputs)
        return task.score(model.encoder), model.encoder.parameter_counts()["model"].trained

    # --- the run -----------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Copy the best stage to the run folder, its card with the table of what was tried."""
        stage = self.stages / self.plan.best
        shutil.copytree(stage / "tokenizer", self.folder / "tokenizer", dirs_exist_ok=True)
        for name in _RUN_FILES:
            with replace_file(self.folder / name) as part:
                shutil.copyfile(stage / name, part)
        table = auto_table(self.plan)
        card = (stage / "README.md").read_text(encoding="utf-8").replace(str(stage), str(self.folder))
        card = card.replace(f"# {stage.name}\n", f"# {self.folder.name}\n", 1)
        tried = "\n".join([markdown_table(table.columns, table.cells), "", *(f"- {note}" for note in table.notes)])
        text = f"{card}\n## What was tried in {self.budget}\n\nBest stage: `stages/{stage.name}`.\n\n{tried}\n"
        folder = RunFolder(self.folder)
        folder.write("README.md", text)
        with replace_file(self.folder / "delta.safetensors") as part:
            shutil.copyfile(stage / "delta.safetensors", part)


def _steps(folder: Path) -> int:
    """The gradient steps that a finished stage took."""
    return max(row["step"] for row in read_json_lines(folder / "log.jsonl"))


def _verdict_line(row: AutoRow, primary: str) -> str:
    line = f"{row.stage}: {primary} {row.metric:.4g}"
    if row.change is not None and row.change_interval is not None:
        low, high = row.change_interval
        line += f", {100 * row.change:+.1f} points (95 % {100 * low:+.1f} to {100 * high:+.1f}) from the best before"
    return f"{line}: {row.verdict}, {row.seconds:,.0f} s"
