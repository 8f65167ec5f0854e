"""The pairs that a recipe names: opened, filtered by language, split for validation, counted and hashed.

Input: a recipe. Output: training and validation ``Pairs``. Indexes of a source are cached in the cache folder, so that
opening it again is fast.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

from clasp.config.recipe import DataSettings, Recipe
from clasp.data.cache_folder import cache_folder
from clasp.data.formats.rows import DEFAULT_COLUMNS
from clasp.data.formats.setting_hints import RECIPE_HINTS, SettingHints
from clasp.data.formats.skipped_files import escape_name
from clasp.data.pairs import ColumnNames, Pairs, caption_languages, describe_pair_formats, open_pairs, split_by_group
from clasp.data.readers import PairIndex
from clasp.data.samples.emoji import SAMPLE_SCHEME, sample_file
from clasp.data.shard_stage import ShardStage
from clasp.models.features import FeatureSource
from clasp.training.settings import MAX_AUTO_BATCH_SIZE, TrainPlan, plan_training
from clasp.types import UserError

TrainValPairs = tuple[Pairs, Pairs]  # training, validation


def open_training_pairs(recipe: Recipe) -> TrainValPairs:
    """Training and validation pairs, of the first at most ``data.max_pairs``. Raises ``UserError``."""
    train, val = open_all_pairs(recipe)
    return limit_pairs(train, recipe.data.max_pairs), val


def open_all_pairs(recipe: Recipe) -> TrainValPairs:
    """Training and validation pairs, filtered by language. Raises ``UserError``."""
    data = recipe.data
    if data.train is None:
        raise UserError(
            f"no pairs to train on: set data.train to {describe_pair_formats()}; or start from "
            "the recipe photos, which needs none"
        )
    for key, source in (("data.train", data.train), ("data.val", data.val)):
        if source is not None and not source.isascii() and re.search("[\ud800-\udfff]", source):
            raise UserError(
                f"{key} = {escape_name(source)} is not valid Unicode, which the recipe of a run must be; rename it, or "
                "give a link to it"
            )
    pairs = _open(data.train, recipe)
    if data.val is not None:
        return pairs, _open(data.val, recipe)
    return split_by_group(pairs, data.val_fraction)


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


def count_samples_per_epoch(pairs: Pairs, recipe: Recipe) -> int:
    """Number of samples in an epoch."""
    if recipe.data.captions == "sample":
        return len(pairs)
    return int(pairs.caption_counts.sum())


def hash_pairs(index: PairIndex, val: Pairs) -> str:
    """A hash of ids, captions and groups of a run's pairs, which determine the order of its batches."""
    digest = hashlib.sha256()
    for before, texts in ((b"[", index.ids), (b", ", index.texts), (b", ", val.ids)):  # as one list of lists in JSON
        digest.update(before)
        for piece in texts.json_pieces():
            digest.update(piece)
    digest.update(b"]")
    for column in (index.group, index.caption_offsets, index.caption):
        for start in range(0, len(column), _HASHED_AT_ONCE):
            digest.update(column[start : start + _HASHED_AT_ONCE].astype(np.int64).tobytes())
    return digest.hexdigest()


_HASHED_AT_ONCE = 1 << 20


_MAX_LIVE_BATCH_SIZE = 128  # where a tower runs in every step and its activations have to fit in memory


def plan_run(recipe: Recipe, train: Pairs, inputs: FeatureSource) -> TrainPlan:
    """Batch size, epochs and steps of a run. Raises ``UserError`` for a batch size above the number of pairs, or below
    ``loss.negatives``, and for class pairs in steps in which a tower runs."""
    plan = plan_training(
        recipe.train, count_samples_per_epoch(train, recipe), max_batch_size=_largest_batch(inputs, recipe)
    )
    recipe.loss.require_batch_size(plan.batch_size)
    if recipe.data.class_ratio is not None and _live(inputs, recipe):
        raise UserError(
            f"data.class_ratio = {recipe.data.class_ratio:g} is for features that are cached: set tune.image and "
            "tune.text to [\"none\"], data.feature_cache to 'auto', and data.cached_augmentations with data.augment"
        )
    return plan


def _live(inputs: FeatureSource, recipe: Recipe) -> bool:
    """Whether a tower runs in every step."""
    return not inputs.both_towers_frozen or (recipe.data.augment is not None and not recipe.data.cached_augmentations)


def _largest_batch(inputs: FeatureSource, recipe: Recipe) -> int:
    return _MAX_LIVE_BATCH_SIZE if _live(inputs, recipe) else MAX_AUTO_BATCH_SIZE
