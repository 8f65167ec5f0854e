"""The pairs that a recipe names: opened, filtered by language, split for validation.

Input: a recipe. Output: training and validation ``Pairs``. Indexes of a source are cached in the cache folder, so that
opening it again is fast. Note: nothing here imports torch, so that a path that is not there is refused at once.
"""

from __future__ import annotations

import re

import numpy as np

from clasp.config.recipe import DataSettings, Recipe
from clasp.data.cache_folder import cache_folder
from clasp.data.formats.rows import DEFAULT_COLUMNS
from clasp.data.formats.setting_hints import RECIPE_HINTS, SettingHints
from clasp.data.formats.skipped_files import escape_name
from clasp.data.formats.sources import names_address
from clasp.data.pairs import (
    ColumnNames,
    Pairs,
    caption_languages,
    describe_pair_formats,
    existing_paths,
    expand_source,
    open_pairs,
    split_by_group,
)
from clasp.data.samples.emoji import SAMPLE_SCHEME, sample_file
from clasp.data.shard_stage import ShardStage
from clasp.errors import UserError, counted
from clasp.training.settings import TOO_FEW_PAIRS

TrainValPairs = tuple[Pairs, Pairs]  # training, validation
_NAME_VAL = "name pairs to validate on with data.val=PAIRS"


def open_training_pairs(recipe: Recipe) -> TrainValPairs:
    """Training and validation pairs, of the first at most ``data.max_pairs``. Raises ``UserError``."""
    opened = open_all_pairs(recipe)
    return select_training_pairs(recipe, opened), opened[1]


def require_sources(data: DataSettings) -> None:
    """Raises ``UserError`` unless pairs to train on are named, and are there where they are files."""
    for _, source in _named_sources(data):
        remote = source.startswith(SAMPLE_SCHEME) or all(map(names_address, expand_source(source)))
        if not remote:
            existing_paths(source)


def _named_sources(data: DataSettings) -> list[tuple[str, str]]:
    """The key and the source of training and validation pairs."""
    if data.train is None:
        raise UserError(
            f"no pairs to train on: set data.train to {describe_pair_formats()}; or start from "
            "the recipe photos, which needs none"
        )
    named = [("data.train", data.train), *([] if data.val is None else [("data.val", data.val)])]
    for key, source in named:
        if not source.isascii() and re.search("[\ud800-\udfff]", source):
            raise UserError(
                f"{key} = {escape_name(source)} is not valid Unicode, which the recipe of a run must be; rename it, or "
                "give a link to it"
            )
    return named


def open_all_pairs(recipe: Recipe) -> TrainValPairs:
    """Training and validation pairs, filtered by language. Raises ``UserError``."""
    data = recipe.data
    opened = [_open(source, recipe) for _, source in _named_sources(data)]
    if len(opened) == 2:
        return opened[0], opened[1]
    try:
        return split_by_group(opened[0], data.val_fraction)
    except UserError as error:  # one group
        raise UserError(f"{error}; {_NAME_VAL}") from None


def select_training_pairs(recipe: Recipe, opened: TrainValPairs) -> Pairs:
    """Those of the training pairs that ``data.max_pairs`` selects. Raises ``UserError`` for fewer than two."""
    (train, val), data = opened, recipe.data
    if len(train) > 1:
        return limit_pairs(train, data.max_pairs)
    if data.val is None:
        total, held_out = counted(len(train) + len(val), "pair"), f"{len(val):,} {'is' if len(val) == 1 else 'are'}"
        why = f"of the {total} of {data.train}, {held_out} held out to validate on (data.val_fraction = "
        why += f"{data.val_fraction:g}); give more pairs, or {_NAME_VAL}"
    else:
        why = f"data.train = {data.train} has no other; give more pairs"
    raise UserError(f"{TOO_FEW_PAIRS}, and there is only one: {why}")


def limit_pairs(train: Pairs, max_pairs: int | None) -> Pairs:
    """Those of the pairs that ``data.max_pairs`` selects, in their order: groups stay whole but for the last."""
    if max_pairs is None or len(train) <= max_pairs:
        return train
    lowest = np.argsort(train.group_fractions("max_pairs"), kind="stable")[:max_pairs]
    return train.subset(np.sort(lowest))


def open_pairs_for_recipe(
    source: str,
    recipe: Recipe,
    *,
    columns: ColumnNames = DEFAULT_COLUMNS,
    image_root: str | None = None,
    hints: SettingHints = RECIPE_HINTS,
) -> Pairs:
    """Pairs for a trained model; those of its recipe are read with the recipe's format and columns unless given."""
    return open_pairs_for_settings(source, recipe.data, columns=columns, image_root=image_root, hints=hints)


def open_pairs_for_settings(
    source: str,
    data: DataSettings,
    *,
    columns: ColumnNames = DEFAULT_COLUMNS,
    image_root: str | None = None,
    hints: SettingHints = RECIPE_HINTS,
) -> Pairs:
    """As ``open_pairs_for_recipe``, by the ``[data]`` of a recipe alone."""
    path = sample_file(source, cache_folder()) if source.startswith(SAMPLE_SCHEME) else source
    format = data.format if source in (data.train, data.val) else None
    if source in (data.train, data.val) and columns == DEFAULT_COLUMNS:
        columns, image_root = data.columns, image_root or data.image_root
    stage = None
    if source in (data.train, data.val):
        stage = ShardStage(cache_folder() / "shards", int(data.stage_gb * 1e9))
    return open_pairs(
        path,
        format=format,
        columns=columns,
        image_root=image_root,
        cache=cache_folder() / "pairs",
        stage=stage,
        hints=hints,
    )


def _open(source: str, recipe: Recipe) -> Pairs:
    data = recipe.data
    pairs = open_pairs_for_recipe(source, recipe)
    if not data.languages:
        return pairs
    selected = pairs.in_languages(data.languages)
    if not selected:
        found = caption_languages(pairs)
        raise UserError(
            f"zero pairs: no caption of {source} is in {', '.join(data.languages)} (data.languages); "
            f"its captions are in {', '.join(found) or 'languages it does not name'}"
        )
    return selected
