"""Where the results of a model go: its run folder, or a folder that the user names.

Input: a ``ModelSource``, and the folder given with ``--out``. Output: ``ResultFolder``, to which rows are appended.
Note: the model card of a run shows its evaluations too; a named folder holds the results of one model, which its
``model.json`` names; a folder with other content is refused before anything is computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clasp.commands.evaluated_model import ModelSource
from clasp.data.atomic_files import append_json_lines, translate_disk_errors, write_text_file
from clasp.evaluation.results import EvaluationResult
from clasp.report.model_card import with_evaluations, with_section
from clasp.report.run_record import RESULTS_FILE, read_results
from clasp.report.tables import AnnotatedTable
from clasp.types import MessageCallback, UserError

MODEL_FILE = "model.json"
CARD_FILE = "README.md"


class ResultFolder:
    """The folder for the results of one model. Raises ``UserError`` for one of another, and where none is named."""

    def __init__(self, model: ModelSource, out: str | Path | None):
        self.model = model
        if out is None and model.run is None:
            raise UserError(f"{model.name} is not a run folder: name a folder for its results with --out")
        self.path = Path(out) if out is not None else model.run or Path()
        self._is_run = out is None or (model.run is not None and model.run.resolve() == self.path.resolve())
        if not self._is_run:
            self._require_ours()
        if (self.path / RESULTS_FILE).exists():
            read_results(self.path)  # a damaged file is told before anything is computed, not by the next report

    def _require_ours(self) -> None:
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        found = self._read()
        if found is None:
            raise UserError(f"--out {self.path} holds something other than results; name a new folder")
        if found.get("model") != self.model.name:
            raise UserError(
                f"--out {self.path} holds the results of {found.get('model')}, and this is {self.model.name}; name "
                "another folder"
            )

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / MODEL_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def require_fingerprint(self, fingerprint: str) -> None:
        """Raises ``UserError`` where the model of this name had other weights when the folder was begun; begins it."""
        if self._is_run:
            return
        found = self._read()
        if found is not None and found.get("fingerprint") != fingerprint:
            raise UserError(
                f"--out {self.path} holds the results of {self.model.name} with other weights; name another folder"
            )
        with translate_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if found is None:
                text = json.dumps({"model": self.model.name, "fingerprint": fingerprint}, indent=1)
                write_text_file(self.path / MODEL_FILE, text)

    def record(self, results: Sequence[EvaluationResult], say: MessageCallback) -> None:
        """Add rows to ``results.jsonl`` and, in a run folder, the evaluations to its model card, where there is one."""
        self.append(RESULTS_FILE, [result.to_row() for result in results])
        self._write_card(lambda card: with_evaluations(card, read_results(self.path)), say)

    def record_table(self, heading: str, table: AnnotatedTable, say: MessageCallback) -> None:
        """Write a table to the model card of a run, in place of one under the same heading."""
        self._write_card(lambda card: with_section(card, heading, [table]), say)

    def _write_card(self, change: Callable[[str], str], say: MessageCallback) -> None:
        card = self.path / CARD_FILE
        if not self._is_run or not card.is_file():
            return
        try:
            written = change(card.read_text(encoding="utf-8"))
        except (UserError, UnicodeDecodeError) as error:
            return say(f"{card} does not show these results: {error}")
        with translate_disk_errors(self.path):
            write_text_file(card, written)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to a ``.jsonl``."""
        with translate_disk_errors(self.path):
            append_json_lines(self.path / name, rows)
