"""``clasp train auto``: from a closed form on cached features to tuning inside the towers, within a budget.

Input: a recipe with ``[auto]``, and a folder. Output: an ordinary run, that of the best stage; the stages are runs too,
in ``RUN/stages``. The heads are chosen in closed form, both towers are tuned, the heads are solved again for what was
tuned, and take gradient steps with what is left of the budget. A stage is kept where the run's own validation metric is
better. Note: Ctrl-C ends it with the best stage so far; ``plan.json`` has what was tried and is what ``clasp resume``
goes on from. Stages that ended and candidates that were scored are not repeated. ``commands.auto_stages`` trains and
records a stage, ``commands.auto_closed_forms`` has those in closed form; which there are is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from clasp.commands.auto_closed_forms import ClosedFormStages
from clasp.commands.auto_stages import AutoCallbacks, AutoStages
from clasp.commands.closed_form import attention_of_runs, with_layer_pools
from clasp.commands.kept_trials import delete_trials
from clasp.commands.repeated_lines import said_once
from clasp.commands.step_timing import SlowStepError, time_steps
from clasp.config.auto_plan import (
    CLOSED_FORM_STAGE,
    TUNINGS,
    StagePlan,
    StepTiming,
    TowerTuning,
    changed,
    fit_heads,
    fit_tuning,
    plan_heads,
    plan_last_layers,
    plan_tuning,
    tuning_stage_name,
    tunings_in,
    with_random_heads,
)
from clasp.config.build import build_model
from clasp.config.datasets import TrainValPairs, limit_pairs, open_training_pairs
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.config.run_plan import hash_pairs
from clasp.data.folder_lock import lock_folder, require_unlocked
from clasp.data.formats.setting_hints import RECIPE_HINTS
from clasp.data.missing_images import require_images
from clasp.data.pairs import Pairs
from clasp.data.readers import PairIndex
from clasp.data.sample_size import few_validation_pairs
from clasp.errors import counted
from clasp.evaluation.from_pairs import require_validation
from clasp.report.auto_table import AutoPlan, AutoRow
from clasp.training.run_code import all_code_names, allow_code, require_allowed
from clasp.training.run_files import PLAN_FILE
from clasp.training.run_folder import RunFolder
from clasp.types import UserError

_TIMED_VALIDATION = 256  # pairs, at most, whose evaluation is timed
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
    require_unlocked(run)
    if (run / PLAN_FILE).exists():
        raise UserError(
            f"{run} holds a climb already; go on with: clasp resume {run}; or choose another name with --name"
        )
    RunFolder(run).require_free()
    pairs = open_training_pairs(recipe)
    require_validation(*pairs)
    require_images(RECIPE_HINTS, *pairs, max_bad_fraction=recipe.data.max_bad_fraction)
    build_model(changed(recipe, {}), meta=True)
    for line in (recipe.auto.announcement, *few_validation_pairs(pairs[1].group_count)):
        callbacks.say(line)
    with lock_folder(run) as require_held:
        plan = AutoPlan(recipe.to_dict())
        with allow_code(all_code_names(plan.recipe).values()):  # the stages name what the recipe names
            climbing = _Climb(recipe, run, plan, pairs, callbacks, require_held)
            plan.write(run)
            try:
                return climbing.run()
            except UserError:
                if not plan.rows:  # the same command would start again, and fail in the same way
                    with suppress(UserError):
                        require_held()  # else the folder was moved, and its place may be another run's
                        delete_trials(run)
                        (run / PLAN_FILE).unlink(missing_ok=True)
                raise


def resume_climb(run: Path, callbacks: AutoCallbacks) -> AutoResult:
    """Go on with an interrupted climb; the stages that ended are kept."""
    callbacks = replace(callbacks, say=said_once(callbacks.say))
    plan = AutoPlan.read(run)
    if plan.finished:
        raise UserError(f"{run} is finished: nothing is left to resume")
    require_allowed(all_code_names(plan.recipe), run)
    recipe = recipe_from_dict(plan.recipe, str(run / PLAN_FILE))
    with lock_folder(run) as require_held, allow_code(all_code_names(plan.recipe).values()):
        climb = _Climb(recipe, run, plan, open_training_pairs(recipe), callbacks, require_held)
        climb.require_same_pairs()
        return climb.run()


class _Climb:
    """One session of a climb."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        plan: AutoPlan,
        pairs: TrainValPairs,
        callbacks: AutoCallbacks,
        require_held: Callable[[], None],
    ):
        assert recipe.auto is not None
        self.budget, self.base = recipe.auto, with_layer_pools(recipe)
        self.folder, self.plan, self.pairs, self.io = run, plan, pairs, callbacks
        self._stages = AutoStages(run, plan, pairs, recipe.auto, callbacks, require_held)
        self._closed_forms = ClosedFormStages(self.base, pairs, plan, self._stages, callbacks)
        self._tunings = tunings_in(self.budget.minutes, len(pairs[0]))

    def run(self) -> AutoResult:
        with self._stages:
            return self._run()

    def _run(self) -> AutoResult:
        interrupted = False
        try:
            with attention_of_runs(self.base):
                self._closed_forms.of_frozen_towers()
                for number, method in enumerate(self._tunings, 2):
                    self._tuning(number, method)
                tuned, unbeatable = self._best_tuning(), self._unbeatable()
                self._closed_forms.of_tuned_towers(tuned, unbeatable)
                if tuned is None and not unbeatable:
                    self._closed_forms.of_all_pairs()
                self._heads()
        except KeyboardInterrupt:
            interrupted = True
        self._stages.write()
        if self.plan.best:
            self._stages.publish()
        if not interrupted:
            delete_trials(self.folder)
        self.plan.finished = not interrupted  # after the run is whole, so that a kill before goes on to that
        self._stages.write()
        return AutoResult(self.folder, self.plan, interrupted)

    def require_same_pairs(self) -> None:
        """Raises ``UserError`` where the pairs are not those of the stages that ended, which further ones are compared
        with on the validation pairs."""
        hashes: dict[int | None, str] = {}
        for stage in [row.stage for row in self.plan.rows if row.stage and row.metric is not None]:
            folder = RunFolder(self._stages.folder / stage)
            most = recipe_from_dict(folder.recipe(), stage).data.max_pairs
            if most not in hashes:
                hashes[most] = hash_pairs(PairIndex(limit_pairs(self.pairs[0], most)), self.pairs[1])
            if folder.base().get("pairs") != hashes[most]:
                raise UserError(
                    f"{self.folder} cannot go on: the pairs of {self.base.data.train} have changed since {stage}"
                )

    # --- the stages --------------------------------------------------------------------------------------------------

    def _tuning(self, number: int, method: TowerTuning) -> None:
        """Stage 2 and on: tuning inside the towers, from heads of the last layers."""
        name = tuning_stage_name(number, method)
        if self.plan.row(name) is not None:
            return
        reason = self._reason_against_tuning()
        if reason and not self._stages.interrupted(name):
            return self._stages.leave_out(name, method.name, reason)
        start = self._start_of_tuning()
        base = self._base(start.recipe)
        stage = plan_tuning(base, number, str(self._stages.folder / start.name), method, self._specs(method, base))
        if self._stages.resumed_or_ended(stage):
            return
        made = self.plan.row(start.name) is not None
        if "text" not in method.towers:
            self._closed_forms.cache_captions()
        try:
            timing = self._time_steps(stage.recipe if made else with_random_heads(stage.recipe))
        except SlowStepError as error:
            reason = f"{error}: fewer than {error.steps} fit into {self._stages.left}"
            return self._stages.leave_out(name, method.name, reason)
        self.plan.reserved_seconds = self._closed_forms.seconds_of_tuned(timing, stage.recipe)
        self._stages.write()  # so that a kill in the stage keeps the reserve for the methods after it
        left = self._stages.left.after(self.plan.reserved_seconds + self._seconds_of(start))
        planned = fit_tuning(stage, timing, left)
        if not isinstance(planned, str) and not made:
            self._stages.train(start)
            planned = self._unbeatable() or planned
        self._stages.train_if_planned(stage, planned)

    def _time_steps(self, recipe: Recipe) -> StepTiming:
        """The time of a recipe that tunes towers, its evaluation from that of a part of many validation pairs. Raises
        ``SlowStepError`` where a step says that no stage of tuning fits."""
        train, val = self.pairs
        part = limit_pairs(val, _TIMED_VALIDATION)

        def timed_with(some: Pairs) -> StepTiming:
            left = self._stages.left.seconds
            return time_steps(recipe, (train, some), self.io.bar, left=float("inf") if left is None else left)

        try:
            require_validation(train, part)
            timing = timed_with(part)
        except UserError:  # the part may have one class alone, or too few images that can be read
            return timed_with(val)
        return replace(timing, evaluation=timing.evaluation * len(val) / len(part))

    def _heads(self) -> None:
        """The last stage: gradient steps of the heads on cached features, where tuning left time."""
        number, kept = 3 + len(TUNINGS), self._closed_forms.kept
        recipe = recipe_from_dict(RunFolder(self._stages.folder / kept).recipe(), kept)
        stage = plan_heads(self._base(recipe), number, str(self._stages.folder / kept))
        if self._stages.resumed_or_ended(stage):
            return
        if reason := self._reason_against_heads(recipe):
            return self._stages.leave_out(stage.name, stage.method, reason)
        timing = time_steps(stage.recipe, self.pairs, self.io.bar)
        self._stages.train_if_planned(stage, fit_heads(stage, timing, self._stages.left))

    def _reason_against_heads(self, start: Recipe) -> str:
        """Why gradient steps of the heads are not tried; ``start``: the recipe of the closed form they start from. One
        of few pairs has left the features of the others to be computed, which takes what those of tuned towers take."""
        left = self._stages.left
        if reason := self._nothing_to_gain():
            return reason
        few = start.data.max_pairs is not None and start.data.max_pairs < len(self.pairs[0])
        if few and left.seconds is not None and left.seconds < self.plan.reserved_seconds:
            return f"features of all pairs do not fit into {left}"
        return ""

    def _reason_against_tuning(self) -> str:
        """Why no further method of tuning is tried: it starts anew, so it must have the time of the first."""
        if reason := self._nothing_to_gain():
            return reason
        first = self._first_tuning()
        if first is None:
            return self._closed_forms.reason_against_steps(self._stages.left)
        if first.metric is None:
            return f"as {first.stage}"
        left = self._stages.left.after(self.plan.reserved_seconds)
        enough = (left.seconds or 0) >= first.seconds or (left.steps or 0) >= first.steps
        return "" if enough else f"{first.stage} took more than {left}"

    def _nothing_to_gain(self) -> str:
        """Why no further stage is tried, whatever it is: the budget has ended, or the best has all that can be had."""
        if self._stages.left.nothing:
            return f"the budget of {self.budget} has ended"
        return self._unbeatable()

    def _unbeatable(self) -> str:
        """Why nothing can be better than the best stage; empty where something can."""
        best = self.plan.row(self.plan.best)
        if best is None or best.metric != 1.0:
            return ""
        of = counted(len(self.pairs[1]), "pair")
        return f"{best.stage} has 100 % on validation ({of}), and nothing can be better"

    def _base(self, start: Recipe) -> Recipe:
        """The user's recipe with the layers and heads of a stage; its batch size is still "auto" where it was."""
        sides = {"image": start.image, "text": start.text}
        layers = {side: {"extra_layers": settings.extra_layers} for side, settings in sides.items()}
        return changed(self.base, {**layers, "head": start.to_dict()["head"]})

    def _start_of_tuning(self) -> StagePlan:
        """The stage that tuning starts from: the closed form of the last layers, which may not be made yet."""
        closed_form = recipe_from_dict(RunFolder(self._stages.folder / CLOSED_FORM_STAGE).recipe(), CLOSED_FORM_STAGE)
        alone = {side: {"extra_layers": []} for side in ("image", "text")}
        model = build_model(changed(closed_form, {**alone, "head": {"width": 1}}), meta=True)
        last = plan_last_layers(closed_form, min(model.image.width, model.text.width))
        return last or StagePlan(CLOSED_FORM_STAGE, "closed form", "", closed_form)

    def _seconds_of(self, start: StagePlan) -> float:
        """About the time that making the start of tuning takes: that of the closed form, which is a stage like it."""
        closed_form = self.plan.row(CLOSED_FORM_STAGE)
        assert closed_form is not None
        return closed_form.seconds if self.plan.row(start.name) is None else 0.0

    def _first_tuning(self) -> AutoRow | None:
        return next((row for row in self.plan.rows if row.stage.startswith("2-")), None)

    def _best_tuning(self) -> AutoRow | None:
        """The best stage that tuned the towers, kept or not."""
        tuned = [row for row in self.plan.rows if row.stage[:2] in _TUNING_NUMBERS and row.metric is not None]
        return max(tuned, key=lambda row: row.metric or 0.0, default=None)

    def _specs(self, method: TowerTuning, base: Recipe) -> dict[str, list[str]]:
        """What each tower takes of the method: where one of its parts does not fit a net, the other parts."""
        specs = {}
        for side in method.towers:
            for chosen in (list(method.specs), list(method.specs[1:]), list(method.specs[:1])):
                try:
                    build_model(changed(base, {"tune": {side: chosen}}), meta=True)
                except UserError:
                    continue
                specs[side] = chosen
                break
        return specs
