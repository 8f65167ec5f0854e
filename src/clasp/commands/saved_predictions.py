"""The predictions of a model for single queries, in files that ``clasp report`` reads.

Input: a task with its scored queries. Output: ``predictions/TASK-DATA.jsonl`` in the folder of the results: a line that
names task, data and model, then one for each query. Note: an evaluation that is repeated replaces its file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clasp.data.atomic_files import replace_file, translate_disk_errors
from clasp.evaluation.tasks import EvaluationTask, ScoredQueries

PREDICTIONS_FOLDER = "predictions"


def save_predictions(folder: Path, task: EvaluationTask, scored: Sequence[ScoredQueries]) -> Path:
    """Write the file of a task; returns its path."""
    stem = re.sub(r"\W+", "-", Path(task.data).stem).strip("-")[:40]
    digest = hashlib.sha256(task.data.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    file = folder / PREDICTIONS_FOLDER / f"{task.name}-{stem}-{digest}.jsonl"
    with translate_disk_errors(folder):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as part, part.open("w", encoding="utf-8") as handle:
            for row in ({"task": task.name, "data": task.data}, *_query_rows(scored)):
                handle.write(json.dumps(row, ensure_ascii=True) + "\n")
    return file


def _query_rows(scored: Sequence[ScoredQueries]) -> Iterator[dict[str, Any]]:
    for each in scored:
        for scores in each.scores:
            for row in scores.prediction_rows():
                yield {"direction": scores.direction, "language": each.language, **row}
