"""The record of a run: what its folder tells about it, read from files alone.

Input: a run folder. Output: a ``RunRecord``: recipe, events of ``log.jsonl``, rows of ``results.jsonl``, ``cost.json``,
``plan.json`` of a run with ``[auto]``, ``analysis.json`` and pictures. No model is loaded. Note: a part that is not
there is empty or ``None``, since an interrupted or imported run lacks some; a part that is there and damaged is a
``UserError``. Only the last line of ``log.jsonl`` may be cut short, by a killed process; it is counted, not read.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clasp.analysis.record import AnalysisRecord, read_analyses
from clasp.data.atomic_files import has_its_checksum, read_json_lines
from clasp.evaluation.language_sets import ALL_LANGUAGES, macro_language, macro_set
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.tasks import MultilingualTask, RetrievalTask, ZeroShotTask
from clasp.report.auto_table import AutoPlan
from clasp.report.evaluation_files import PREDICTIONS_FOLDER, evaluation_file
from clasp.report.evaluation_labels import EvaluationKey, evaluation_key, evaluation_labels
from clasp.training.cost import COST_FILE as _COST_FILE
from clasp.training.cost.ledger import RunCost, read_cost
from clasp.training.recipe_changes import dotted_settings
from clasp.training.run_files import LOG_FILE, PLAN_FILE, RESULTS_FILE, require_folder
from clasp.training.run_folder import RunFolder
from clasp.types import UserError

RunState = Literal["finished", "interrupted", "imported", "not trained"]

PRIMARY_METRICS = {
    ZeroShotTask.name: ZeroShotTask.primary,
    RetrievalTask.name: RetrievalTask.primary,
    MultilingualTask.name: RetrievalTask.primary,
}
"""The metric that a run is validated by, by task"""
_LOGGED_PRIMARIES = (
    f"{macro_language(ALL_LANGUAGES)}/{RetrievalTask.primary}",
    RetrievalTask.primary,
    ZeroShotTask.primary,
)
_PICTURES = ("searches.png", "search.png", "maps.png")
_PICTURED_TASKS = ("retention", "zeroshot", "retrieval")


@dataclass(frozen=True, slots=True)
class LearningCurves:
    """Values by step: the training loss, and the primary metric on the validation pairs (``metric`` is its name)."""

    loss: dict[int, float]
    validation: dict[int, float]
    metric: str


@dataclass(frozen=True, slots=True)
class ClassPredictions:
    """The right and the predicted class of every image of an evaluation; ``label``: its data and options."""

    task: str
    label: str
    expected: Sequence[str]
    predicted: Sequence[str]


@dataclass(frozen=True, slots=True)
class EvaluationPicture:
    """A picture of the results of an evaluation; ``label``: its data and options."""

    task: str
    label: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The files of one run. ``label`` names it among the others of a report; ``unread_lines`` counts those of
    ``log.jsonl`` that were cut short."""

    path: Path
    label: str
    recipe: Mapping[str, Any]
    base: Mapping[str, Any] | None
    events: Sequence[Mapping[str, Any]]
    unread_lines: int
    results: Sequence[EvaluationResult]
    cost: RunCost | None
    plan: AutoPlan | None
    analyses: Sequence[AnalysisRecord]
    predictions: Sequence[ClassPredictions]
    pictures: Mapping[str, Path]
    evaluation_pictures: Sequence[EvaluationPicture]
    state: RunState

    @property
    def primary(self) -> EvaluationResult | None:
        """The result that the run is validated by; ``None`` where it was not evaluated."""
        return primary_result(self.results)

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe with dotted keys: ``train.lr`` to its value."""
        return dotted_settings(self.recipe)

    def last_event(self, kind: str) -> Mapping[str, Any]:
        """The last event of this kind in ``log.jsonl``; empty where there is none."""
        return next((event for event in reversed(self.events) if event["event"] == kind), {})

    def curves(self) -> LearningCurves:
        """What ``log.jsonl`` has by step. Steps that were repeated after an interruption count once, as run last."""
        loss = {e["step"]: float(e["loss"]) for e in self.events if e["event"] == "step" and "loss" in e}
        evaluations = [event for event in self.events if event["event"] == "evaluation"]
        logged = {name for event in evaluations for name in event["metrics"]}
        metric = next((name for name in _LOGGED_PRIMARIES if name in logged), "")
        found = {e["step"]: float(e["metrics"][metric]) for e in evaluations if metric in e["metrics"]}
        return LearningCurves(dict(sorted(loss.items())), dict(sorted(found.items())), metric)


def read_run_record(run: str | Path, label: str) -> RunRecord:
    """Read a run folder. Raises ``UserError``: no such folder, a folder that is no run, or a damaged file."""
    path = Path(run)
    require_folder(path)
    plan = AutoPlan.read(path) if (path / PLAN_FILE).exists() else None
    if plan is None and not (path / "recipe.toml").exists():
        several = (path / "sweep.jsonl").exists()
        hint = f"; it is a sweep, name runs inside it: {path}/*/" if several else ""
        raise UserError(f"{path} is not a run folder: it has no recipe.toml{hint}")
    events, unread = _read_events(path / LOG_FILE)
    results = read_results(path)
    return RunRecord(
        path=path,
        label=label,
        recipe=_read_recipe(path, plan),
        base=_read_json(path / "base.json"),
        events=events,
        unread_lines=unread,
        results=results,
        cost=read_cost(path) if (path / _COST_FILE).exists() else None,
        plan=plan,
        analyses=read_analyses(path),
        predictions=_read_predictions(path, results),
        pictures={name: path / name for name in _PICTURES if (path / name).exists()},
        evaluation_pictures=_find_pictures(path, results),
        state=_state(path, plan),
    )


def read_results(run: Path) -> list[EvaluationResult]:
    """The rows of ``results.jsonl`` in order, empty where there is no such file. Raises ``UserError`` where it is
    damaged."""
    file = run / RESULTS_FILE
    if not file.exists():
        return []
    rows = read_json_lines(file)
    try:
        if changed := [number for number, row in enumerate(rows, 1) if not has_its_checksum(row)]:
            raise UserError(f"{file} is damaged: line {changed[0]} is not as it was written; delete the line")
        return [EvaluationResult.from_row(row) for row in rows]
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error!r}") from None


def primary_result(results: Iterable[EvaluationResult]) -> EvaluationResult | None:
    """The first result with a primary metric of its own: over both directions, and over all languages."""
    for result in results:
        one_language = result.task == MultilingualTask.name and macro_set(result.language) is None
        if result.task in PRIMARY_METRICS and not one_language:
            return result
    return None


# --- files -----------------------------------------------------------------------------------------------------------


def _read_recipe(path: Path, plan: AutoPlan | None) -> Mapping[str, Any]:
    file = path / "recipe.toml"
    if not file.exists():
        assert plan is not None
        return plan.recipe
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def _read_json(file: Path) -> Any:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def _read_events(file: Path) -> tuple[list[Mapping[str, Any]], int]:
    if not file.exists():
        return [], 0
    lines = file.read_bytes().splitlines()  # not of text, which also ends a line at U+2028
    events, unread = [], 0
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"line {number} of {file} is damaged: {error}") from None
            unread = 1
    return events, unread


def _read_predictions(run: Path, results: Sequence[EvaluationResult]) -> list[ClassPredictions]:
    """The predictions of classes that ``clasp eval --predictions`` kept, by file name."""
    found, labels = [], evaluation_labels(results)
    for file in sorted((run / PREDICTIONS_FOLDER).glob("zeroshot-*.jsonl")):
        try:
            about, *rows = read_json_lines(file)
            rows = [about, *rows] if "expected" in about else rows  # a first line named task and data, at first
            key = EvaluationKey(about["task"], about.get("evaluation_id") or about["data"])
            label = labels.get(key, file.stem)
            predicted = [str(row["predicted"]) for row in rows]
            found.append(ClassPredictions(key.task, label, [row["expected"] for row in rows], predicted))
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file} is damaged: {error!r}") from None
    return found


def _find_pictures(run: Path, results: Sequence[EvaluationResult]) -> list[EvaluationPicture]:
    """The pictures of evaluations, and those that an earlier version named by their task alone."""
    rows = {evaluation_key(result): result for result in results}
    named = [
        EvaluationPicture(key.task, label, run / f"{evaluation_file(key.task, rows[key].data, key.identity)}.png")
        for key, label in evaluation_labels(results).items()
        if key.task in _PICTURED_TASKS and rows[key].evaluation_id
    ]
    earlier = [EvaluationPicture(task, "pairs not recorded", run / f"{task}.png") for task in _PICTURED_TASKS]
    return [each for each in (*named, *earlier) if each.path.exists()]


def _state(path: Path, plan: AutoPlan | None) -> RunState:
    if RunFolder(path).has_state or (plan is not None and not plan.finished):
        return "interrupted"
    if (path / "imported.json").exists():
        return "imported"
    return "finished" if (path / "delta.safetensors").exists() else "not trained"
