"""Evaluated pairs that a run was trained on: its metrics there show what it has memorised.

Input: a run folder and the pairs to evaluate it on. Output: a warning line, or none. Note: a pair is the same where its
id and the version of its image are (of a file: size and time of modification; of a member of a tar: those of the tar,
and the place in it), so an image under another id is not noticed, nor a copy that has another time. Training pairs that
cannot be read any more, or would have to be fetched, are not compared. A large table or tar is compared only where its
index is in the cache folder: indexing it takes minutes, and a status line says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from clasp.config.datasets import open_training_pairs
from clasp.config.recipe import recipe_from_dict
from clasp.data.formats.index_cache import NotIndexed, only_cached_indexes
from clasp.data.pairs import Pairs, expand_source
from clasp.errors import counted
from clasp.training.run_folder import RunFolder
from clasp.types import UserError

_COMPARED = 1_000  # evaluated pairs, evenly chosen
_WHY = "metrics on them do not measure generalisation"
_INDEXED_BYTES, _INDEXED_FILES = 1 << 24, 100_000  # of training pairs: fewer are indexed anew
_PACKED = (".tar", ".parquet")  # files of many images, in a folder of shards


def training_overlap(run: Path | None, name: str, evaluated: Mapping[str, Pairs]) -> list[str]:
    """A warning for each of the pairs to evaluate among which are training pairs of the run, with what they are called
    before it; none for a model that is not a run."""
    if run is None:
        return []
    recipe = recipe_from_dict(RunFolder(run).recipe(), name)
    train_source = recipe.data.train or ""
    if not train_source or "://" in train_source:
        return []
    try:
        with nullcontext() if _is_small(train_source) else only_cached_indexes():
            train, _ = open_training_pairs(recipe)
            return _compare(train, name, evaluated)
    except NotIndexed:
        return [f"not checked whether {name} was trained on pairs to evaluate: {train_source} has no index here"]
    except (UserError, OSError):
        return []


def _compare(train: Pairs, name: str, evaluated: Mapping[str, Pairs]) -> list[str]:
    picks = {what: range(0, len(pairs), -(-len(pairs) // _COMPARED)) for what, pairs in evaluated.items()}
    asked = {what: {pair.id: pair for pair in map(pairs.__getitem__, picks[what])} for what, pairs in evaluated.items()}
    wanted = {id for some in asked.values() for id in some}
    rows = {id: row for row, id in enumerate(train.ids) if id in wanted}
    lines = []
    for what, some in asked.items():
        same = sum(train[rows[id]].image.version == pair.image.version for id, pair in some.items() if id in rows)
        if same:
            of = f"{counted(len(some), 'pair')} to evaluate"
            if len(some) < len(evaluated[what]):
                of = f"{counted(len(some), 'compared pair')}, of {len(evaluated[what]):,} to evaluate,"
            lines.append(f"{f'{what}: ' if what else ''}warning: {same:,} of {of} are training pairs of {name}: {_WHY}")
    return lines


def _is_small(source: str) -> bool:
    """Whether pairs are indexed in seconds: few bytes of tables and tars, and few files in folders."""
    size = count = 0
    for path in expand_source(source):
        size += os.path.getsize(path) if os.path.isfile(path) else 0
        for folder, _, names in os.walk(path):
            count += len(names)
            size += sum(os.path.getsize(os.path.join(folder, name)) for name in names if name.endswith(_PACKED))
            if size > _INDEXED_BYTES or count > _INDEXED_FILES:
                return False
    return size <= _INDEXED_BYTES
