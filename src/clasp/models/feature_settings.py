"""Settings and callbacks of reading a model's inputs, common to the image side and the text side.

Input: the values of a recipe and the callbacks of a command. Output: two dataclasses, and the storage dtype of a
request. Note: whether inputs are read live or from the feature cache is ``CachePolicy``'s decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from clasp.data.feature_cache.requests import FeatureRequest
from clasp.data.loader import log_skipped
from clasp.models.cache_policy import CachePolicy
from clasp.models.precision import PrecisionChoice, frozen_precision
from clasp.models.tower import Tower
from clasp.plain_types import Precision, StorageDtype
from clasp.types import MessageCallback, ProgressFactory, SkippedSample, no_progress_bar

_FLOAT32 = PrecisionChoice("float32", "the default")


@dataclass(frozen=True, slots=True)
class FeatureSettings:
    """Where features are cached, and how images are read."""

    cache: CachePolicy
    tuned: CachePolicy | None = None
    """The cache of towers that were tuned and are frozen now, whose base weights do not tell their features apart"""
    workers: int = 0
    """Worker processes that read and decode images; 0: the main process."""
    cached_augmentations: int = 0
    """Augmented views of each image in the cache, besides the plain one; 0: augmented images are read live."""
    seed: int = 0
    """Random seed of the augmented views."""
    max_bad_fraction: float = 0.02
    """Fraction of the images that may be unreadable before an error is raised."""
    precision: PrecisionChoice = _FLOAT32
    """That of the device or the recipe, from which ``frozen_precision`` derives that of each tower."""

    def cache_of(self, tower: Tower) -> CachePolicy:
        """The cache of the pooled features of a tower, or of its states."""
        return self.cache if self.tuned is None or not tower.was_tuned else self.tuned

    def tower_precision(self, tower: Tower) -> Precision:
        """What the frozen part of ``tower`` computes in."""
        return frozen_precision(self.precision.precision, convolutional=tower.convolutional)

    def report_precision(self, tower: Tower, notify: MessageCallback) -> None:
        """A line for features that are not in float32: the precision, its reason, and how to have the other."""
        if (precision := self.tower_precision(tower)) != "float32":
            why = f"{self.precision.reason}; for the other: train.precision=float32"
            notify(f"features of {tower.name} are computed in {precision} (cosine with float32 about 0.9999): {why}")


@dataclass(frozen=True, slots=True)
class FeatureCallbacks:
    """``bar`` opens a progress bar while features are computed; ``notify`` is called with a line where caching depended
    on the size; ``on_skipped`` is called with the images that an evaluation could not read, each once."""

    bar: ProgressFactory = no_progress_bar
    notify: MessageCallback = lambda line: None
    on_skipped: Callable[[Iterable[SkippedSample]], None] = log_skipped


def choose_storage(
    request: FeatureRequest, policy: CachePolicy, tower: str, notify: MessageCallback
) -> StorageDtype | None:
    """The dtype in which these features are cached; ``None``: recomputed in every epoch. ``tower``: its name."""
    plan = policy.plan(request)
    if policy.weighs_size(request):
        size = f"{plan.bytes:,} bytes of {policy.free_bytes():,} that are free on disk"
        how = "computed once and cached" if plan.storage else "recomputed in every epoch"
        notify(f"states of {plan.what} after {request.part.depth} blocks of {tower} are {how}: {size}")
    return plan.storage
