"""Whether the output of a frozen tower or frozen prefix is cached, in which dtype, and its size on disk.

Input: requests (``FeatureRequest``) and the setting ``data.feature_cache``. Output: a ``CachePlan`` for each, before
anything is computed. "off" caches nothing, a dtype caches everything in it, and "auto" caches the pooled features of a
frozen tower in float32, and hidden states after a block in float16 where they fill at most a quarter of the free disk.
Note: features that are cached already are read whatever the free disk space.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clasp.data.feature_cache.arrays import cache_path
from clasp.data.feature_cache.layers import find_layers
from clasp.data.feature_cache.partial_file import allocated_bytes
from clasp.data.feature_cache.requests import FeatureRequest, TextFeatureRequest
from clasp.data.text_column import TextColumn
from clasp.plain_types import StorageDtype

FeatureCacheMode = Literal["auto", "off"] | StorageDtype

_MAX_DISK_FRACTION = 0.25  # of the free bytes that "auto" may fill with hidden states


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How the features of one request are cached. ``bytes`` is the size of their rows on disk; ``storage`` their dtype
    there, or ``None`` where they are too large and are recomputed in every epoch; ``file`` the existing cache file."""

    what: Literal["images", "captions"]
    count: int
    storage: StorageDtype | None
    bytes: int
    file: Path | None
    key: Mapping[str, Any]
    started_bytes: int = 0
    """On disk already, in the partial file of an interrupted build, which the next one goes on with"""

    @property
    def bytes_to_write(self) -> int:
        """Bytes that are still to be written."""
        return self.bytes if self.storage and not self.file else 0


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """The cache folder, and what may be written there."""

    folder: Path
    mode: FeatureCacheMode = "auto"

    def free_bytes(self) -> int:
        """Free bytes on the disk of the cache folder."""
        return shutil.disk_usage(nearest_existing(self.folder)).free

    def weighs_size(self, request: FeatureRequest) -> bool:
        """Whether caching depends on the size: hidden states after a block, where no dtype was chosen."""
        return self.mode == "auto" and request.part.depth > 0

    def plan(self, request: FeatureRequest, *, reserved_bytes: int = 0) -> CachePlan:
        """How these features are cached, when ``reserved_bytes`` of the free bytes are reserved by earlier requests."""
        assert self.mode != "off", "nothing is cached, so there is nothing to plan"
        storage: StorageDtype = self.mode if self.mode != "auto" else "float16" if request.part.depth else "float32"
        key, size = {**request.key, "storage": storage}, request.num_bytes(storage)
        found = find_layers(self.folder / "features", key)
        file = found.file if found else None
        too_large = (
            self.weighs_size(request)
            and file is None
            and size > _MAX_DISK_FRACTION * (self.free_bytes() - reserved_bytes)
        )
        if too_large:
            return CachePlan(request.what, request.count, None, size, file, key)
        path = cache_path(self.folder / "features", {**key, "shape": (request.rows, request.part.width)})
        started = 0 if file else allocated_bytes(path)
        return CachePlan(request.what, request.count, storage, size, file, key, started)


def nearest_existing(folder: Path) -> Path:
    """The folder, or the first of its parents that is there."""
    return next(at for at in (folder, *folder.parents) if at.exists())


def plan_features(requests: Iterable[tuple[FeatureRequest, CachePolicy]]) -> list[CachePlan]:
    """The plans of requests, each under its policy, cached one after the other: each cache file once, in the order of
    computation.

    Nothing is computed or written. A request whose texts are all among those of an earlier one is left out, and the
    bytes that an earlier request writes are not free for a later one.
    """
    plans: list[CachePlan] = []
    cached: list[TextColumn] = []
    for request, policy in requests:
        if isinstance(request, TextFeatureRequest) and any((texts.find(request.texts) >= 0).all() for texts in cached):
            continue
        plan = policy.plan(request, reserved_bytes=sum(earlier.bytes_to_write for earlier in plans))
        if isinstance(request, TextFeatureRequest) and plan.storage is not None:
            cached.append(request.index.distinct)
        if all(plan.key != earlier.key for earlier in plans):
            plans.append(plan)
    return plans
