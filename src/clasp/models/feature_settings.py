"""How the inputs of a model are read, and what a caller is told meanwhile: what the image side and the text side share.

In: the values of a recipe and the callbacks of a command. Note: nothing here decides anything; the choice between live
inputs and the feature cache is ``CachePolicy``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from clasp.data.feature_cache.dtypes import StorageDtype
from clasp.data.feature_cache.requests import FeatureRequest
from clasp.data.loader import log_skipped
from clasp.models.cache_policy import CachePolicy
from clasp.types import MessageCallback, ProgressFactory, SkippedSample, no_progress_bar


@dataclass(frozen=True, slots=True)
class FeatureSettings:
    """Where features are cached, and how images are read."""

    cache: CachePolicy
    workers: int = 0
    """Processes that read and decode images; 0: this one."""
    cached_augmentations: int = 0
    """Augmented views of each image in the cache, beside the plain one; 0: augmented images are read live."""
    seed: int = 0
    """Of the augmented views."""
    max_bad_fraction: float = 0.02
    """Of all images that may be unreadable."""


@dataclass(frozen=True, slots=True)
class FeatureCallbacks:
    """``bar`` opens a progress bar while features are computed; ``notify`` gets a line where the size decided whether
    they are cached; ``on_skipped`` gets the images that an evaluation could not read, each once."""

    bar: ProgressFactory = no_progress_bar
    notify: MessageCallback = lambda line: None
    on_skipped: Callable[[Iterable[SkippedSample]], None] = log_skipped


def choose_storage(
    request: FeatureRequest, policy: CachePolicy, tower: str, notify: MessageCallback
) -> StorageDtype | None:
    """The dtype in which these features are cached; ``None`` to compute them in every epoch. ``tower`` is its name."""
    plan = policy.plan(request)
    if policy.weighs_size(request):
        size = f"{plan.bytes:,} bytes of {policy.free_bytes():,} that are free on disk"
        how = "computed once and kept" if plan.storage else "computed anew each time"
        notify(f"states of {plan.what} after {request.part.depth} blocks of {tower} are {how}: {size}")
    return plan.storage
