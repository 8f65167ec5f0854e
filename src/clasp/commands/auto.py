"""``clasp train auto``: from a closed form on cached features to tuning inside the towers, within a budget.

Input: a recipe with ``[auto]``, and a folder. Output: an ordinary run, that of the best stage; the stages are runs too,
in ``RUN/stages``. The heads are chosen in closed form (``commands.closed_form``), both towers are tuned, the heads are
solved again for what was tuned, and take gradient steps with what is left of the budget. A stage is kept where the
run's own validation metric is better. Note: Ctrl-C ends it with the best stage so far; ``plan.json`` has what was tried
and is what ``clasp resume`` goes on from. Finished stages are not repeated. ``commands.auto_stages`` trains and records
a stage; which there are is decided here. A long class: all decisions of a climb, in their order.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState

from clasp.commands.auto_stages import AutoCallbacks, AutoStages
from clasp.commands.closed_form import (
    ClosedFormSearch,
    ClosedFormTrial,
    attention_of_runs,
    begin_search,
    choose_trial,
    search_recipe,
    tuned_search_recipe,
    with_layer_pools,
)
from clasp.commands.repeated_lines import said_once
from clasp.commands.step_timing import time_steps
from clasp.config.auto_plan import (
    CLOSED_FORM_STAGE,
    RIDGES,
    TUNED_CLOSED_FORM,
    TUNED_RIDGES,
    TUNINGS,
    StagePlan,
    TowerTuning,
    changed,
    fit_heads,
    fit_tuning,
    plan_closed_form,
    plan_heads,
    plan_last_layers,
    plan_tuned_closed_form,
    plan_tuning,
    tuned_closed_form_seconds,
    tuning_stage_name,
)
from clasp.config.build import (
    build_feature_source,
    build_model,
    build_model_and_preprocessing,
)
from clasp.config.datasets import TrainValPairs, hash_pairs, open_training_pairs
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.data.cache_folder import cache_folder
from clasp.data.folder_lock import lock_folder
from clasp.data.readers import PairIndex
from clasp.data.sample_size import few_validation_pairs
from clasp.evaluation.from_pairs import validation_task
from clasp.report.auto_table import PLAN_FILE, AutoPlan, AutoRow
from clasp.training.closed_form_heads import ClosedFormHeads
from clasp.training.run_code import all_code_names, allow_code, require_allowed
from clasp.training.run_folder import RunFolder
from clasp.training.warm_start import load_initial_weights
from clasp.types import UserError

_SEARCH_SHARE = 0.05  # of the minutes, for a search of closed forms once its features are cached
_MINUTES_FOR_ALL_LAYERS = 3  # their moments alone take a quarter of a minute
_TUNING_NUMBERS = tuple(f"{2 + number}-" for number in range(len(TUNINGS)))


@dataclass(frozen=True, slots=True)
class AutoResult:
    """What a climb left: the plan with its rows, and whether it was interrupted."""

    run: Path
    plan: AutoPlan
    interrupted: bool


def climb(recipe: Recipe, run: Path, callbacks: AutoCallbacks) -> AutoResult:
    """Spend the budget of ``recipe.auto`` on a new run. Raises ``UserError`` before any compute where it can."""
    assert recipe.auto is not None
    callbacks = replace(callbacks, say=said_once(callbacks.say))
    if (run / PLAN_FILE).exists():
        raise UserError(
            f"{run} holds a climb already; go on with: clasp resume {run}; or choose another name with --name"
        )
    RunFolder(run).require_free()
    pairs = open_training_pairs(recipe)
    build_model(changed(recipe, {}), meta=True)
    for line in (recipe.auto.announcement, *few_validation_pairs(len(pairs[1]))):
        callbacks.say(line)
    with lock_folder(run):
        plan = AutoPlan(recipe.to_dict())
        plan.write(run)
        with allow_code(all_code_names(plan.recipe).values()):  # the stages name what the recipe names
            return _Climb(recipe, run, plan, pairs, callbacks).run()


def resume_climb(run: Path, callbacks: AutoCallbacks) -> AutoResult:
    """Go on with an interrupted climb; the stages that ended are kept."""
    callbacks = replace(callbacks, say=said_once(callbacks.say))
    plan = AutoPlan.read(run)
    if plan.finished:
        raise UserError(f"{run} is finished: nothing is left to resume")
    require_allowed(all_code_names(plan.recipe), run)
    recipe = recipe_from_dict(plan.recipe, str(run / PLAN_FILE))
    with lock_folder(run), allow_code(all_code_names(plan.recipe).values()):
        climb = _Climb(recipe, run, plan, open_training_pairs(recipe), callbacks)
        climb.require_same_pairs()
        return climb.run()


@contextmanager
def _own_features(run: Path) -> Iterator[Path]:
    """A folder for the features of the tuned towers of a run, since the usual cache is by base weights; what a killed
    session left in it is deleted."""
    folder = cache_folder() / f"tuned-{hashlib.sha256(os.fsencode(os.path.realpath(run))).hexdigest()[:16]}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Climb:
    """One session of a climb."""

    def __init__(self, recipe: Recipe, run: Path, plan: AutoPlan, pairs: TrainValPairs, callbacks: AutoCallbacks):
        assert recipe.auto is not None
        self.budget, self.base = recipe.auto, with_layer_pools(recipe)
        self.folder, self.plan, self.pairs, self.io = run, plan, pairs, callbacks
        self._stages = AutoStages(run, plan, pairs, recipe.auto, callbacks)

    def run(self) -> AutoResult:
        interrupted = False
        try:
            with attention_of_runs(self.base):
                self._closed_form()
                for method in TUNINGS:
                    self._tuning(method)
                self._tuned_closed_form()
                self._heads()
        except KeyboardInterrupt:
            interrupted = True
        self._stages.write()
        if self.plan.best:
            self._stages.publish()
        self.plan.finished = not interrupted  # after the run is whole, so that a kill before goes on to that
        self._stages.write()
        return AutoResult(self.folder, self.plan, interrupted)

    def require_same_pairs(self) -> None:
        """Raises ``UserError`` where the pairs are not those of the stages that ended, which further ones are compared
        with on the validation pairs."""
        ended = [row.stage for row in self.plan.rows if row.stage and row.metric is not None]
        content = hash_pairs(PairIndex(self.pairs[0]), self.pairs[1]) if ended else None
        for stage in ended:
            if RunFolder(self._stages.folder / stage).base().get("pairs") != content:
                raise UserError(
                    f"{self.folder} cannot go on: the pairs of {self.base.data.train} have changed since {stage}"
                )

    # --- the stages --------------------------------------------------------------------------------------------------

    def _closed_form(self) -> None:
        """Stage 1: the heads in closed form that validation chooses."""
        if self.plan.row(CLOSED_FORM_STAGE) is not None:
            return
        self._drop_candidates()
        stage, heads = self._search()
        if (left := self._stages.left.seconds) is not None and left < 0:
            stage = replace(stage, reason=f"{stage.reason}; the budget of {self.budget} ended before it")
        self._stages.train(stage, heads)

    def _search(self) -> tuple[StagePlan, ClosedFormHeads]:
        """The closed form that validation chooses, and its heads."""
        layers = "upper half" if (self.budget.minutes or float("inf")) < _MINUTES_FOR_ALL_LAYERS else "all"
        search = self._begin_search(search_recipe(self.base, layers))
        self.io.say(f"features of the layers ({layers}) are cached; {self._stages.seconds:,.0f} s so far")
        trials = self._run_search(search, RIDGES)
        chosen, reason = choose_trial(trials)
        return plan_closed_form(self.base, chosen.candidate, reason), search.heads(chosen.candidate)

    def _tuned_closed_form(self) -> None:
        """The heads in closed form again, of the layers of the tuned towers: the best stage of tuning."""
        number = 2 + len(TUNINGS)
        name = f"{number}-{TUNED_CLOSED_FORM}"
        if self.plan.row(name) is not None:
            return
        self._drop_candidates()
        tuned = self._best_tuning()
        if tuned is None:
            return self._stages.leave_out(name, "closed form of the tuned towers", "no stage tuned the towers")
        if (left := self._stages.left.seconds) is not None and left <= 0:
            ended = f"the budget of {self.budget} has ended"
            return self._stages.leave_out(name, "closed form of the tuned towers", ended)
        folder = self._stages.folder / tuned.stage
        recipe = recipe_from_dict(RunFolder(folder).recipe(), tuned.stage)
        recipe = tuned_search_recipe(self.base, recipe, str(folder))
        with _own_features(self.folder) as features:
            search = self._begin_search(recipe, features)
            chosen, reason = choose_trial(self._run_search(search, TUNED_RIDGES))
            heads = search.heads(chosen.candidate)
        stage = plan_tuned_closed_form(recipe, number, chosen.candidate, f"towers of {tuned.stage}; {reason}")
        self._stages.train(stage, heads)

    def _begin_search(self, recipe: Recipe, cache: Path | None = None) -> ClosedFormSearch:
        """The search over the towers of ``recipe``, or those of ``train.init_from``, frozen; ``cache``: as that of
        ``build_feature_source``."""
        train = self.pairs[0]
        parts = build_model_and_preprocessing(recipe, lambda: PairIndex(train).texts)
        if recipe.train.init_from is not None:
            load_initial_weights(parts.model, recipe.to_dict())
        parts.model.requires_grad_(False).to(PartialState().device).eval()
        inputs = build_feature_source(parts, recipe, bar=self.io.bar, say=self.io.say, cache=cache)
        sides = inputs.batch_reader(train, PairIndex(train), None)
        task = validation_task(*self.pairs, inputs)
        self.plan.primary = task.primary
        return begin_search(parts.model, recipe, sides, task, inputs)

    def _run_search(self, search: ClosedFormSearch, ridges: Sequence[tuple[float, float]]) -> list[ClosedFormTrial]:
        """Try candidates for a share of the minutes, each a row of the plan, the first with the seconds of the moments;
        half as long is left for what follows."""
        began, left = time.monotonic(), self._stages.left.seconds
        share = float("inf") if self.budget.minutes is None else _SEARCH_SHARE * 60 * self.budget.minutes
        limit = share if left is None else min(share, left - share / 2)
        trials = search.run(self.io.say, lambda: time.monotonic() - began > limit, ridges)
        for place, trial in enumerate(trials):
            seconds = trial.seconds + (0.0 if place else search.seconds_of_moments)
            row = AutoRow(method=str(trial.candidate), verdict="tried", seconds=seconds)
            row = replace(row, metric=trial.score.value, interval=tuple(trial.score.interval))
            self.plan.rows.append(replace(row, trained=trial.delta_bytes // 4))
        return trials

    def _drop_candidates(self) -> None:
        """Remove the candidates of a search that was interrupted."""
        while self.plan.rows and not self.plan.rows[-1].stage:
            self.plan.rows.pop()

    def _heads(self) -> None:
        """The last stage: gradient steps of the heads on cached features, where tuning left time."""
        number = 3 + len(TUNINGS)
        stage = plan_heads(self._base(CLOSED_FORM_STAGE), number, str(self._stages.folder / CLOSED_FORM_STAGE))
        if self._stages.resumed_or_ended(stage):
            return
        if self._stages.left.nothing:
            return self._stages.leave_out(stage.name, stage.method, f"the budget of {self.budget} has ended")
        timing = time_steps(stage.recipe, self.pairs, self.io.bar)
        self._stages.train_if_planned(stage, fit_heads(stage, timing, self._stages.left))

    def _tuning(self, method: TowerTuning) -> None:
        """Stage 2 and on: tuning inside the towers, from heads of the last layers."""
        number = 2 + TUNINGS.index(method)
        name = tuning_stage_name(number, method)
        if self.plan.row(name) is not None:
            return
        reason = self._no_time_for_tuning()
        if reason and not self._stages.interrupted(name):
            return self._stages.leave_out(name, method.name, reason)
        start = self._start_of_tuning()
        base = self._base(start)
        stage = plan_tuning(base, number, str(self._stages.folder / start), method, self._specs(method, base))
        if self._stages.resumed_or_ended(stage):
            return
        timing = time_steps(stage.recipe, self.pairs, self.io.bar)
        first, closed_form = self.plan.rows[0], self.plan.row(CLOSED_FORM_STAGE)
        assert closed_form is not None
        self.plan.reserved_seconds = tuned_closed_form_seconds(timing, first.seconds + closed_form.seconds)
        left = self._stages.left.after(self.plan.reserved_seconds)
        self._stages.train_if_planned(stage, fit_tuning(stage, timing, left))

    def _no_time_for_tuning(self) -> str:
        """Why no further method of tuning is tried: it starts anew, so it must have the time of the first."""
        if self._stages.left.nothing:
            return f"the budget of {self.budget} has ended"
        first = self._first_tuning()
        if first is None:
            return ""
        if first.metric is None:
            return f"as {first.stage}"
        left = self._stages.left.after(self.plan.reserved_seconds)
        enough = (left.seconds or 0) >= first.seconds or (left.steps or 0) >= first.steps
        return "" if enough else f"{first.stage} took more than {left}"

    def _base(self, start: str) -> Recipe:
        """The user's recipe with the layers and heads of a stage; its batch size is still "auto" where it was."""
        made = RunFolder(self._stages.folder / start).recipe()
        layers = {side: {"extra_layers": made[side]["extra_layers"]} for side in ("image", "text")}
        return changed(self.base, {**layers, "head": made["head"]})

    def _start_of_tuning(self) -> str:
        """The stage that tuning starts from; the closed form of the last layers is made here where it was not."""
        closed_form = recipe_from_dict(RunFolder(self._stages.folder / CLOSED_FORM_STAGE).recipe(), CLOSED_FORM_STAGE)
        alone = {side: {"extra_layers": []} for side in ("image", "text")}
        model = build_model(changed(closed_form, {**alone, "head": {"width": 1}}), meta=True)
        last = plan_last_layers(closed_form, min(model.image.width, model.text.width))
        if last is None:
            return CLOSED_FORM_STAGE
        if self.plan.row(last.name) is None and not self._stages.left.nothing:
            self._stages.train(last)
        return last.name if self.plan.row(last.name) is not None else CLOSED_FORM_STAGE

    def _first_tuning(self) -> AutoRow | None:
        return next((row for row in self.plan.rows if row.stage.startswith("2-")), None)

    def _best_tuning(self) -> AutoRow | None:
        """The best stage that tuned the towers, kept or not."""
        tuned = [row for row in self.plan.rows if row.stage[:2] in _TUNING_NUMBERS and row.metric is not None]
        return max(tuned, key=lambda row: row.metric or 0.0, default=None)

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
