"""``clasp compare``: two models on the queries of one task.

Input: two models, a task and its options as typed. Output: ``ModelComparison``; with a folder also ``comparison.json``
and ``predictions.jsonl``, in which a row is a query with the predictions and the scores of both models. Note: the
models are loaded one after the other, and nothing is written into a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clasp.commands.evaluate import make_context, pair_opener, require_single_queries, require_task_applies
from clasp.commands.evaluated_model import ModelSource, find_model
from clasp.commands.repeated_lines import said_once
from clasp.commands.training_overlap import training_overlap
from clasp.data.atomic_files import append_json_lines, translate_disk_errors, write_text_file
from clasp.data.pairs import Pairs
from clasp.evaluation.comparison import Comparison, compare_scored, primary_comparison
from clasp.evaluation.registry import TaskEntry, changed_options, find_task, parse_task_options, used_options
from clasp.evaluation.tasks import EvaluationTask, ScoredQueries
from clasp.training.unfinished import unfinished_lines
from clasp.types import MessageCallback, ProgressFactory, UserError, no_progress_bar

COMPARISON_FILE, PREDICTIONS_FILE = "comparison.json", "predictions.jsonl"


@dataclass(frozen=True, kw_only=True)
class ModelComparison:
    """Both models as typed, task, data and options as used, the comparison of every metric, and of the primary one."""

    first: str
    second: str
    task: str
    data: str
    options: Mapping[str, str]
    comparisons: list[Comparison]
    primary: Comparison

    @property
    def asked(self) -> str:
        """The data, and the options that are not at their default."""
        return ", ".join((self.data, *changed_options(self.task, self.options)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in ``comparison.json``."""
        return {
            "first": self.first,
            "second": self.second,
            "task": self.task,
            "data": self.data,
            "options": dict(self.options),
            "primary": self.primary.to_dict(),
            "comparisons": [each.to_dict() for each in self.comparisons],
        }


def compare_models(
    models: tuple[str | Path, str | Path],
    task: str,
    options: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    say: MessageCallback = lambda line: None,
    bar: ProgressFactory = no_progress_bar,
) -> ModelComparison:
    """Compare two models as ``find_model`` takes them; ``out``: a new folder for both files. Raises ``UserError``."""
    say = said_once(say)  # of the data, which both read
    entry = find_task(task)
    given = parse_task_options(task, entry, options)
    require_single_queries(task, entry, "compare")
    if out is not None and Path(out).exists() and not (Path(out).is_dir() and not any(Path(out).iterdir())):
        raise UserError(f"--out {out} exists already; name a new folder")
    sources = [find_model(model) for model in models]
    for source in sources:
        require_task_applies(task, entry, source)
    opened = [pair_opener(source, entry, given)(given["data"]) for source in sources]  # before any model is loaded
    if str(models[0]) == str(models[1]):
        raise UserError(f"compare: {models[0]} is named twice; name another model to compare it with")
    (built, first), (_, second) = (
        _score(source, pairs, entry, given, say, bar) for source, pairs in zip(sources, opened, strict=True)
    )
    for source, pairs in zip(sources, opened, strict=True):
        for line in (*unfinished_lines(source.run), *training_overlap(source.run, source.name, {"": pairs})):
            say(line)
    comparisons = compare_scored(built, first, second)
    done = ModelComparison(
        first=sources[0].name,
        second=sources[1].name,
        task=task,
        data=given["data"],
        options=used_options(entry, given),
        comparisons=comparisons,
        primary=primary_comparison(built, comparisons),
    )
    if out is not None:
        with translate_disk_errors(Path(out)):
            Path(out).mkdir(parents=True, exist_ok=True)
            append_json_lines(Path(out) / PREDICTIONS_FILE, _prediction_rows(built.name, first, second))
            write_text_file(Path(out) / COMPARISON_FILE, json.dumps(done.to_dict(), indent=1))
    return done


def _score(
    source: ModelSource,
    pairs: Pairs,
    entry: TaskEntry,
    given: Mapping[str, str],
    say: MessageCallback,
    bar: ProgressFactory,
) -> tuple[EvaluationTask, list[ScoredQueries]]:
    assert entry.build is not None
    context = make_context(source, lambda: source.load(bar), pairs, entry, given, say, bar)
    task = entry.build(context)
    return task, task.scored(context.model)


def _prediction_rows(
    task: str, first: Sequence[ScoredQueries], second: Sequence[ScoredQueries]
) -> Iterator[dict[str, Any]]:
    """A row for each query; what the models differ in is a list of two."""
    for each, other in zip(first, second, strict=True):
        for one, against in zip(each.scores, other.scores, strict=True):
            theirs = {row["id"]: row for row in against.prediction_rows()}
            for row in one.prediction_rows():
                match = theirs[row["id"]]
                same = {"task": f"{task}/{one.direction}" if one.direction else task, "language": each.language}
                same |= {key: row[key] for key in ("id", "group", "expected")}
                yield same | {key: [row[key], match[key]] for key in row if key not in same}
