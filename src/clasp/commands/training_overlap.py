"""Evaluated pairs that a run was trained on: its metrics there show what it has memorised.

Input: a run folder and the pairs to evaluate it on. Output: a warning line, or none. Note: a pair is the same where its
id and the version of its image file are; copies of a file are other images. Training pairs that cannot be read any
more, or would have to be fetched, are not compared.
"""

from __future__ import annotations

from pathlib import Path

from clasp.config.datasets import open_training_pairs
from clasp.config.recipe import recipe_from_dict
from clasp.data.pairs import Pairs
from clasp.errors import counted
from clasp.training.run_folder import RunFolder
from clasp.types import UserError

_COMPARED = 1_000  # evaluated pairs, evenly chosen


def training_overlap(run: Path | None, name: str, pairs: Pairs) -> list[str]:
    """A warning where pairs to evaluate are training pairs of the run; none for a model that is no run."""
    if run is None:
        return []
    recipe = recipe_from_dict(RunFolder(run).recipe(), name)
    train_source = recipe.data.train or ""
    if not train_source or "://" in train_source:
        return []
    try:
        train, _ = open_training_pairs(recipe)
    except (UserError, OSError):
        return []
    picks = range(0, len(pairs), -(-len(pairs) // _COMPARED))
    asked = {pair.id: pair for pair in map(pairs.__getitem__, picks)}
    rows = {name: row for row, name in enumerate(train.ids) if name in asked}
    same = sum(train[row].image.version == asked[name].image.version for name, row in rows.items())
    if not same:
        return []
    of = f"{counted(len(asked), 'pair')} to evaluate"
    if len(picks) < len(pairs):
        of = f"{counted(len(asked), 'compared pair')}, of {len(pairs):,} to evaluate,"
    return [f"warning: {same:,} of {of} are training pairs of {name}: metrics on them are no measure of generalisation"]
