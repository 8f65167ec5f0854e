"""The names of the files that an evaluation leaves in a run folder beside its rows: predictions and pictures.

Input: task, data and ``evaluation_id``. Output: a name, the same for the writer and for the report. Note: evaluations
that differ in an option or in the content of their pairs have other names, so none replaces another's file.
"""

from __future__ import annotations

import re
from pathlib import Path

PREDICTIONS_FOLDER = "predictions"


def evaluation_file(task: str, data: str, evaluation_id: str) -> str:
    """The name without suffix: ``zeroshot-pics-1a2b3c4d``."""
    stem = re.sub(r"\W+", "-", Path(data).stem).strip("-")[:40]
    return "-".join(filter(None, (task, stem, evaluation_id[:8])))
