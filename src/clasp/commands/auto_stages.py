"""The stages of ``clasp train auto``: each a run of its own, compared with the best before it and recorded in the plan.

Input: the folder of the run, its plan, pairs and budget. Output: runs in ``RUN/stages``, rows of ``plan.json``, and the
best stage copied to ``RUN``. Note: which stages there are is decided in ``commands.auto``; nothing is decided here.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState

from clasp.commands.run_context import Preloaded
from clasp.commands.train import train_recipe
from clasp.config.auto_plan import Left, StagePlan
from clasp.config.budget import AutoSettings
from clasp.config.build import ModelAndPreprocessing, build_feature_source, load
from clasp.config.datasets import TrainValPairs
from clasp.config.recipe import recipe_from_dict
from clasp.data.atomic_files import read_json_lines, replace_file
from clasp.evaluation.from_pairs import validation_task
from clasp.evaluation.results import PrimaryScore
from clasp.models.dual_encoder import DualEncoder
from clasp.report.auto_table import AutoPlan, AutoRow, auto_table
from clasp.report.model_card import cost_section, markdown_table, stage_cost_section
from clasp.training.closed_form_heads import ClosedFormHeads
from clasp.training.cost import COST_FILE
from clasp.training.cost.ledger import RunCost, read_cost
from clasp.training.cost.meters import EnergyMeter
from clasp.training.cost.stages import join_stage_costs
from clasp.training.run_folder import RunFolder
from clasp.training.trackers.console import Reporter, SilentReporter
from clasp.types import MessageCallback, ProgressFactory, UserError, no_progress_bar

_RUN_FILES = ("base.json", "transform.json", "log.jsonl", "results.jsonl", "recipe.toml")


@dataclass(frozen=True, slots=True)
class AutoCallbacks:
    """Where a climb reports: lines, progress bars, and a new reporter for each stage."""

    say: MessageCallback
    bar: ProgressFactory = no_progress_bar
    reporter: Callable[[], Reporter] = SilentReporter


class AutoStages:
    """The stages of one session, within a budget; a context manager around the session, whose energy it measures.

    ``require_held`` raises ``UserError`` once the folder of the run is no longer at its path.
    """

    def __init__(
        self,
        run: Path,
        plan: AutoPlan,
        pairs: TrainValPairs,
        budget: AutoSettings,
        callbacks: AutoCallbacks,
        require_held: Callable[[], None],
    ):
        self.run, self.folder, self.plan, self.pairs = run, run / "stages", plan, pairs
        self.budget, self.io, self.require_held = budget, callbacks, require_held
        self._began, self._earlier = time.monotonic(), plan.seconds
        self._energy, self._earlier_energy = EnergyMeter(), plan.energy_kwh if plan.seconds else 0.0
        self._best_score: PrimaryScore | None = None

    def __enter__(self) -> AutoStages:
        self._energy.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._energy.stop()

    # --- the budget --------------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """The wall time of all sessions so far."""
        return self._earlier + time.monotonic() - self._began

    @property
    def left(self) -> Left:
        """What is left of the budget."""
        if self.budget.steps is not None:
            return Left(None, max(0, self.budget.steps - sum(row.steps for row in self.plan.rows)))
        assert self.budget.minutes is not None
        return Left(60 * self.budget.minutes - self.seconds, None)

    def write(self) -> None:
        """Write the plan with time and energy so far."""
        self.require_held()
        self.plan.seconds, spent = self.seconds, self._energy.measurement.value
        known = spent is not None and self._earlier_energy is not None
        self.plan.energy_kwh = (self._earlier_energy or 0.0) + (spent or 0.0) if known else None
        self.plan.write(self.run)

    # --- one stage ---------------------------------------------------------------------------------------------------

    def resumed_or_ended(self, stage: StagePlan) -> bool:
        """Whether the stage has ended; one that was interrupted is finished first."""
        if self.plan.row(stage.name) is not None:
            return True
        if not self.interrupted(stage.name):
            return False
        self.train(replace(stage, reason="resumed"))
        return True

    def interrupted(self, name: str) -> bool:
        """Whether a stage was begun and did not end."""
        return RunFolder(self.folder / name).has_state

    def train_if_planned(self, stage: StagePlan, planned: StagePlan | str) -> None:
        """Train the stage as it was fitted into the budget, or leave it out for the reason given."""
        if isinstance(planned, str):
            return self.leave_out(stage.name, stage.method, planned)
        self.train(planned)

    def leave_out(self, name: str, method: str, reason: str) -> None:
        """Record a stage that is not trained."""
        self.io.say(f"{name}: left out, {reason}")
        self.plan.rows.append(AutoRow(stage=name, method=method, reason=reason, verdict="left out"))
        self.write()

    def train(self, stage: StagePlan, heads: ClosedFormHeads | None = None, tuned: Path | None = None) -> None:
        """Train a stage, or resume it as it was planned; compare it with the best before, and record it. ``tuned``:
        where the features of its towers are cached, which an earlier stage tuned."""
        self.require_held()
        self.io.say(f"{stage.name}: {stage.method}: {stage.reason}")
        folder, began = self.folder / stage.name, time.monotonic()
        resume = RunFolder(folder).has_state
        shared = Preloaded(pairs=self.pairs, heads=heads, tuned=tuned)
        io = self.io
        recipe = recipe_from_dict(RunFolder(folder).recipe(), stage.name) if resume else stage.recipe
        if resume or not (folder / "delta.safetensors").exists():
            done = train_recipe(
                recipe, folder, say=io.say, bar=io.bar, reporter=io.reporter(), resume=resume, preloaded=shared
            )
            if done.fitted.interrupted:
                raise KeyboardInterrupt
            score, trained = done.task.primary_score(done.scored), done.cost.parameters["model"]["trained"]
        else:  # it ended, and was not recorded any more
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
        self.write()

    def _score(self, name: str) -> tuple[PrimaryScore, int]:
        """The validation score of a stage with its replicates, and its count of trained parameters."""
        model = load(self.folder / name, device=str(PartialState().device))
        assert isinstance(model.encoder, DualEncoder)
        recipe = recipe_from_dict(RunFolder(self.folder / name).recipe(), name)
        parts = ModelAndPreprocessing(model.encoder, model.transform, model.tokenizer)
        inputs = build_feature_source(parts, recipe, bar=self.io.bar)
        task = validation_task(*self.pairs, inputs)
        return task.score(inputs.in_precision(model.encoder)), model.encoder.parameter_counts()["model"].trained

    # --- the run -----------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Copy the best stage to the run folder, its card with the table of what was tried.

        The weights of an earlier best are deleted first and the new ones written last: a kill in between leaves no
        weights beside the files of others.
        """
        self.require_held()
        stage = self.folder / self.plan.best
        kept, whole = read_cost(stage), self._cost()
        (self.run / "delta.safetensors").unlink(missing_ok=True)
        shutil.copytree(stage / "tokenizer", self.run / "tokenizer", dirs_exist_ok=True)
        for name in _RUN_FILES:
            with replace_file(self.run / name) as part:
                shutil.copyfile(stage / name, part)
        folder = RunFolder(self.run)
        folder.write(COST_FILE, whole.to_json())
        table = auto_table(self.plan)
        card = (stage / "README.md").read_text(encoding="utf-8").replace(str(stage), str(self.run))
        card = card.replace(f"# {stage.name}\n", f"# {self.run.name}\n", 1)
        card = card.replace(cost_section(kept), stage_cost_section(whole, kept, stage.name))
        tried = "\n".join([markdown_table(table.columns, table.cells), "", *(f"- {note}" for note in table.notes)])
        text = f"{card}\n## What was tried in {self.budget}\n\nBest stage: `stages/{stage.name}`.\n\n{tried}\n"
        folder.write("README.md", text)
        with replace_file(self.run / "delta.safetensors") as part:
            shutil.copyfile(stage / "delta.safetensors", part)

    def _cost(self) -> RunCost:
        """The cost of all sessions, with all stages that ended; one whose file is damaged is left out, in a line."""
        stages = []
        for name in [row.stage for row in self.plan.rows if row.stage and row.metric is not None]:
            try:
                stages.append(read_cost(self.folder / name))
            except UserError as error:
                self.io.say(f"the costs of {name} are left out: {error}")
        energy = self._energy.measurement._replace(value=self.plan.energy_kwh)
        return join_stage_costs(read_cost(self.folder / self.plan.best), stages, self.plan.seconds, energy)


def _steps(folder: Path) -> int:
    """The gradient steps that a finished stage took."""
    return max(row["step"] for row in read_json_lines(folder / "log.jsonl"))


def _verdict_line(row: AutoRow, primary: str) -> str:
    line = f"{row.stage}: {primary} {row.metric:.4g}"
    if row.change is not None and row.change_interval is not None:
        low, high = row.change_interval
        line += f", {100 * row.change:+.1f} points (95 % {100 * low:+.1f} to {100 * high:+.1f}) from the best before"
    return f"{line}: {row.verdict}, {row.seconds:,.0f} s"
