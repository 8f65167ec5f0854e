"""Whether the disks of a run have room for its features, states and delta, before anything is computed.

Input: a recipe with its pairs and towers, and the run folder. Output: the planned feature caches, or a ``UserError``.
Note: what the partial file of an interrupted build has of these features is not needed again.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence

from clasp.commands.run_context import RunContext
from clasp.config.recipe import Recipe
from clasp.data.pairs import Pairs
from clasp.data.readers import PairIndex
from clasp.evaluation.from_pairs import validation_texts
from clasp.models.cache_policy import CachePlan, CachePolicy, nearest_existing, plan_features
from clasp.models.features import FeatureSource
from clasp.training.class_pairs import WeightedClassPairs
from clasp.training.settings import TrainSettings
from clasp.training.state import copies_in_state
from clasp.types import UserError


def plan_run_features(
    recipe: Recipe,
    inputs: FeatureSource,
    train: Pairs,
    val: Pairs,
    listing: PairIndex,
    classes: WeightedClassPairs | None = None,
) -> list[CachePlan]:
    """The caches of a run of the recipe; ``listing``: the index of ``train``."""
    requests = [inputs.image.request(train, recipe.data.augment), inputs.text.request(listing.texts)]
    if recipe.head.standardize:
        requests.append(inputs.image.request(train))  # heads are initialised from images without augmentation
    if classes is not None:
        requests.append(inputs.text.request(sorted(set(classes.pairs.texts))))
    requests += [inputs.text.request(texts) for texts in validation_texts(train, val)]
    requests.append(inputs.image.request(val))
    caches = {"images": inputs.image.cache, "captions": inputs.text.cache}
    return plan_features([(request, caches[request.what]) for request in requests if request is not None])


def require_room_for_run(context: RunContext) -> None:
    """Raises ``UserError`` where the features of a run, or the tensors of a new one, do not fit on their disks. To be
    called within the attention kernel of the run, which the keys of its features depend on."""
    recipe, cache, run = context.recipe, context.inputs.cache, context.folder.path
    plans = plan_run_features(recipe, context.inputs, context.train, context.val, context.listing, context.classes)
    require_room_for_features(plans, cache)
    if context.state is not None:
        return
    size = _least_copies(recipe.train) * context.model.parameter_counts()["model"].delta_bytes
    at, of_cache = nearest_existing(run), nearest_existing(cache.folder)
    free, beside = shutil.disk_usage(at).free, ""
    if (taken := _bytes_to_allocate(plans)) and at.stat().st_dev == of_cache.stat().st_dev:
        free, beside = free - taken, " beside the feature cache"
    if size > free:
        raise UserError(
            f"cannot keep {size:,} bytes of training states and delta in {run}: {os.strerror(errno.ENOSPC)}, "
            f"{max(free, 0):,} are free{beside}; --runs names a folder on another disk"
        )


def require_room_for_features(plans: Sequence[CachePlan], cache: CachePolicy) -> None:
    """Raises ``UserError`` where planned features do not fit on the disk of the cache."""
    size, free = _bytes_to_allocate(plans), cache.free_bytes()
    if size > free:
        raise UserError(
            f"cannot keep {size:,} bytes in {cache.folder / 'features'}: {os.strerror(errno.ENOSPC)}, {free:,} are "
            "free; data.feature_cache=off computes features in every epoch, and CLASP_CACHE names a cache folder on "
            "another disk"
        )


def _bytes_to_allocate(plans: Sequence[CachePlan]) -> int:
    return sum(max(0, plan.bytes_to_write - plan.started_bytes) for plan in plans)


def _least_copies(settings: TrainSettings) -> int:
    """Copies of the trained tensors that are on disk at once, at least: the state at the start, the one at the end, and
    the delta."""
    first, last = (copies_in_state(settings.select, stepped=stepped) for stepped in (False, True))
    return first + (last if settings.epochs else 0) + 1
