"""The predictions of a model for single queries, in files that ``clasp report`` reads.

Input: a task with its scored queries, and their pairs. Output: ``predictions/TASK-DATA-ID.jsonl`` in the folder of the
results: a line for each query, and in each the ``evaluation_id`` of the row of ``results.jsonl`` that has data and
options; of retrieval also the caption of what was found first. Note: an evaluation that is repeated replaces its file;
one with another option, or on other pairs, has another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clasp.data.atomic_files import replace_file, translate_disk_errors
from clasp.evaluation.identity import EvaluationIdentity
from clasp.evaluation.tasks import EvaluationTask, ScoredQueries
from clasp.report.evaluation_files import PREDICTIONS_FOLDER, evaluation_file
from clasp.types import Pair


def save_predictions(
    folder: Path,
    task: EvaluationTask,
    scored: Sequence[ScoredQueries],
    pairs: Sequence[Pair],
    identity: EvaluationIdentity,
) -> Path:
    """Write the file of a task; returns its path."""
    file = folder / PREDICTIONS_FOLDER / f"{evaluation_file(task.name, task.data, identity.id)}.jsonl"
    about = {"task": task.name, "evaluation_id": identity.id}
    with translate_disk_errors(folder):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as part, part.open("w", encoding="utf-8") as handle:
            for row in _query_rows(scored, pairs):
                handle.write(json.dumps(about | row, ensure_ascii=True) + "\n")
    return file


def _query_rows(scored: Sequence[ScoredQueries], pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    for each in scored:
        for scores in each.scores:
            captions = _found_captions(scores.direction, each.language, pairs)
            for row in scores.prediction_rows():
                caption = captions.get(row["predicted"])  # none of a task's own texts, nor without a prediction
                found = {} if caption is None else {"predicted_caption": caption}
                yield {"direction": scores.direction, "language": each.language, **row, **found}


def _found_captions(direction: str, language: str, pairs: Sequence[Pair]) -> Mapping[str, str]:
    """The caption of all that retrieval may find, by id: an image has its first in the language; none elsewhere."""
    if direction == "image_to_text":
        named = {f"{pair.group}|{text}": text for pair in pairs for text, _ in pair.captions}  # in several languages
        return named | {f"{pair.id}#{n}": text for pair in pairs for n, (text, _) in enumerate(pair.captions)}
    if direction == "text_to_image":
        return {
            pair.id: next((text for text, own in pair.captions if own == language), pair.captions[0].text)
            for pair in pairs
        }
    return {}
