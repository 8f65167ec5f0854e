"""Whether the disks of a run have room for its features, states and delta, before anything is computed.

Input: a recipe with its pairs and towers, and the run folder. Output: the planned feature caches, or a ``UserError``.
Note: a partial file of an interrupted build counts as free, since the build goes on in it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from clasp.commands.run_context import RunContext
from clasp.config.recipe import Recipe
from clasp.data.feature_cache.partial_file import PARTIAL_PATTERN
from clasp.data.pairs import Pairs
from clasp.data.readers import PairIndex
from clasp.evaluation.from_pairs import validation_texts
from clasp.models.cache_policy import CachePlan, plan_features
from clasp.models.features import FeatureSource
from clasp.training.class_pairs import WeightedClassPairs
from clasp.types import UserError

# of the trained tensors, at least: the state at the start (weights, best weights), the one at the end (with two moments
# of AdamW), and the delta; without a gradient step there are no moments
_COPIES, _COPIES_WITHOUT_STEPS = 7, 3


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
    return plan_features([request for request in requests if request is not None], inputs.cache)


def require_room_for_run(context: RunContext) -> None:
    """Raises ``UserError`` where the features of a run, or the tensors of a new one, do not fit on their disks."""
    recipe, inputs = context.recipe, context.inputs
    plans = plan_run_features(recipe, inputs, context.train, context.val, context.listing, context.classes)
    trained = context.model.parameter_counts()["model"].delta_bytes
    copies = _COPIES if recipe.train.epochs else _COPIES_WITHOUT_STEPS
    require_room({inputs.cache.folder: _bytes(plans), context.folder.path: 0 if context.state else copies * trained})


def require_room_for_features(plans: Sequence[CachePlan], inputs: FeatureSource) -> None:
    """Raises ``UserError`` where planned features do not fit on the disk of the cache."""
    require_room({inputs.cache.folder: _bytes(plans)})


def require_room(needed: Mapping[Path, int]) -> None:
    """Raises ``UserError`` where the bytes to be written to these folders are more than their disks have free."""
    disks: dict[int, list[Path]] = {}
    for folder, size in needed.items():
        if size:
            disks.setdefault(os.stat(_existing(folder)).st_dev, []).append(folder)
    for folders in disks.values():
        size = sum(needed[folder] for folder in folders)
        free = shutil.disk_usage(_existing(folders[0])).free + sum(map(_partial_bytes, folders))
        if size > free:
            raise UserError(
                f"cannot keep {size:,} bytes in {' and '.join(map(str, folders))}: {os.strerror(errno.ENOSPC)}, "
                f"{free:,} are free; clasp doctor has the sizes, data.feature_cache=off computes features in every "
                "epoch, and CLASP_CACHE names a cache folder on another disk"
            )


def _bytes(plans: Sequence[CachePlan]) -> int:
    return sum(plan.bytes_to_write for plan in plans)


def _existing(folder: Path) -> Path:
    return next(at for at in (folder, *folder.absolute().parents) if at.exists())


def _partial_bytes(folder: Path) -> int:
    """The bytes on disk of builds that were interrupted."""
    found = 0
    for path in (folder / "features").glob(PARTIAL_PATTERN):
        with suppress(OSError):  # another process has just finished it
            found += path.stat().st_blocks * 512
    return found
