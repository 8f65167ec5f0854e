"""The saved training states of a run: the last two generations, in its folder ``state/``.

Input: a ``TrainState``, and the identity of its run. Output: ``state/state.safetensors``, the one before it as
``state/previous.safetensors``; and the newest that is whole, read back. The results of a run that has ended are here
too, as ``state/results.json``, until the states are deleted: an end that was killed is repeated with the same results,
whatever the last bits of another evaluation are. Note: a state that is damaged, or of another run, is named in a
warning, and the one before is used; training from there gives the same weights, later.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clasp.data.atomic_files import CHECKSUM, has_its_checksum, sync_folder, write_text_file
from clasp.training.run_files import STATE_FOLDER, STATE_NAMES
from clasp.training.state import TrainState
from clasp.training.tensor_file import read_tensor_file, write_tensor_file
from clasp.types import UserError

_NEWEST, _PREVIOUS = STATE_NAMES
_RESULTS = "results.json"
_FACTS, _RUN = "facts", "run"
_log = logging.getLogger(__name__)


class StateFiles:
    """The states in one run folder; constructing the object does no input or output."""

    def __init__(self, run: Path):
        self.run, self.folder = run, run / STATE_FOLDER

    @property
    def paths(self) -> list[Path]:
        """The saved states, the newest first; empty where the first save was never completed."""
        return [path for name in STATE_NAMES if (path := self.folder / name).exists()]

    def write(self, state: TrainState, identity: str) -> None:
        """Save a state of the run ``identity``; the newest so far is kept as the previous one."""
        self.folder.mkdir(exist_ok=True)
        new = self.folder / f"next-{_NEWEST}"
        # one file, so that a kill never pairs new tensors with an old position
        write_tensor_file(new, state.tensors(), {_FACTS: json.dumps(state.metadata()), _RUN: identity})
        newest = self.folder / _NEWEST
        if newest.exists():
            os.replace(newest, self.folder / _PREVIOUS)
        os.replace(new, newest)
        sync_folder(self.folder)

    def read(self, identity: str) -> TrainState:
        """The newest whole state of the run ``identity``. Raises ``UserError`` where there is none."""
        problems: list[str] = []
        for path in self.paths:
            try:
                state = _read_state(path, identity)
            except UserError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                _log.warning("%s; going on from the state before it, that of step %d", problem, state.position.step)
            return state
        raise UserError(
            f"{'; '.join(problems)}; no whole state is left: delete {self.folder} and train again from the start"
        )

    def keep_results(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The results that an earlier end of this run kept, or ``rows``, with their checksums, which are kept."""
        path = self.folder / _RESULTS
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(kept, list) and all(CHECKSUM in row and has_its_checksum(row) for row in kept):
                    return kept
            except (ValueError, TypeError, RecursionError):
                pass
            _log.warning("%s is damaged; the results of this evaluation are taken", path)
        write_text_file(path, json.dumps(list(rows)))
        return list(rows)

    def remove(self) -> None:
        """Delete all of them: the results after the states, so that a kill in between repeats no end without them."""
        for name in (_PREVIOUS, _NEWEST):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_state(path: Path, identity: str) -> TrainState:
    tensors, metadata = read_tensor_file(path)
    if metadata.get(_RUN, identity) != identity:
        raise UserError(f"{path} is the state of another run: other recipe, pairs or base weights")
    try:
        return TrainState.from_tensors(json.loads(metadata[_FACTS]), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from None
