"""What the pairs of a recipe come to: samples, batch size and steps of a run, and a hash of the pairs.

Input: a recipe and its pairs. Output: ``TrainPlan``; numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np

from clasp.config.recipe import Recipe
from clasp.data.pairs import Pairs
from clasp.data.readers import PairIndex
from clasp.models.features import FeatureSource
from clasp.training.settings import MAX_AUTO_BATCH_SIZE, TrainPlan, plan_training
from clasp.types import UserError

_HASHED_AT_ONCE = 1 << 20
_MAX_LIVE_BATCH_SIZE = 128  # where a tower runs in every step and its activations have to fit in memory


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
