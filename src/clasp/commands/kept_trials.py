"""The trials of a search in closed form, kept in the folder of the run: a search that was interrupted takes them.

Input: a folder, and what the scores of a search depend on. Output: ``ClosedFormTrial``s, to the bit as they were. Note:
``RUN/trials.jsonl`` is deleted when the run is finished; its rows are in ``plan.json`` then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from clasp.commands.closed_form import ClosedFormTrial
from clasp.config.auto_plan import Candidate
from clasp.config.recipe import Recipe
from clasp.config.run_plan import hash_pairs
from clasp.data.atomic_files import (
    TORN_SUFFIX,
    append_json_lines,
    has_its_checksum,
    read_json_lines,
    translate_disk_errors,
    with_checksum,
)
from clasp.data.feature_cache.replay import CachedImageReader, CachedTextReader
from clasp.data.loader import BatchReader
from clasp.data.pairs import Pairs
from clasp.data.readers import PairIndex
from clasp.evaluation.results import PrimaryScore

TRIALS_FILE = "trials.jsonl"


def delete_trials(folder: Path) -> None:
    """Remove the trials of a run, and a line that a kill has torn."""
    for name in (TRIALS_FILE, TRIALS_FILE + TORN_SUFFIX):
        (folder / name).unlink(missing_ok=True)


class KeptTrials:
    """Those of one search; of a search without a hash none are kept. ``require_held`` raises ``UserError`` once the
    folder is no longer at its path."""

    def __init__(self, folder: Path, search: str, require_held: Callable[[], None]) -> None:
        self._file, self._search, self._require_held = folder / TRIALS_FILE, search, require_held
        rows = read_json_lines(self._file) if search and self._file.exists() else []
        own = [row for row in rows if isinstance(row, dict) and row.get("search") == search and has_its_checksum(row)]
        self._rows = {json.dumps(row["candidate"]): row for row in own}

    def find(self, candidate: Candidate) -> ClosedFormTrial | None:
        """The trial of a candidate; ``None`` where it was not tried."""
        row = self._rows.get(json.dumps(candidate))
        if row is None:
            return None
        score = PrimaryScore(row["value"], torch.tensor(row["replicates"], dtype=torch.float64))
        return ClosedFormTrial(candidate, score, row["delta_bytes"], row["seconds"])

    def add(self, trial: ClosedFormTrial) -> None:
        """Keep a trial."""
        self._require_held()
        if self._search:
            row = {"search": self._search, "candidate": trial.candidate, "value": trial.score.value}
            row |= {"replicates": trial.score.replicates.tolist()}
            row |= {"delta_bytes": trial.delta_bytes, "seconds": trial.seconds}
            with translate_disk_errors(self._file):
                append_json_lines(self._file, [with_checksum(row)])


def hash_search(recipe: Recipe, sides: BatchReader, val: Pairs) -> str:
    """A hash of the recipe, the cached features and the pairs of a search; empty where a side is not cached:
    what its tower says is not known by a key then."""
    readers = [each for each in (sides.image, sides.text) if isinstance(each, CachedImageReader | CachedTextReader)]
    if len(readers) < 2:
        return ""
    digest = hashlib.sha256()
    if recipe.train.init_from is not None:  # the features of tuned towers are named by the weights before
        digest.update((Path(recipe.train.init_from) / "delta.safetensors").read_bytes())
    keys = [reader.features.kept.metadata["key"] for reader in readers]
    assert isinstance(sides.pairs, PairIndex), "a search reads all captions"
    # keys of features name images and distinct texts, not which captions are whose
    of_pairs = [val.version, hash_pairs(sides.pairs, val), hash_pairs(PairIndex(val), val)]
    digest.update(json.dumps([recipe.to_dict(), keys, of_pairs], sort_keys=True).encode())
    return digest.hexdigest()
