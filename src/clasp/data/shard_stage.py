"""Shards on object storage, staged: fetched one by one into a folder of bounded size when they are read.

Input: addresses, a folder, its size limit. Output: the path of a shard, fetched if it is not there. Note: a shard is
fetched whole, again if need be, and compared with its size, its MD5 where the storage gives one, and the hash of the
bytes that it had when it was first fetched. The least recently used shards are deleted when another needs the room.
Several processes may stage into one folder: each shard is fetched by one of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from clasp.data.atomic_files import is_disk_full, remove_partial_files, replace_file, write_text_file
from clasp.data.shard_download import (
    RemoteObject,
    ShardNotReadError,
    describe_object,
    read_blocks,
    require_storage_package,
)
from clasp.errors import UserError

WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0)  # between attempts
_DESCRIBED_AT_ONCE = 16
_TOUCHED_SECONDS = 5.0  # the time of last use is this exact
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class ShardError(UserError):
    """A shard that cannot be read: it ends a run, where one image that cannot be read is skipped."""


@dataclass(frozen=True, slots=True)
class ShardStage:
    """Where shards are staged: a folder, and the bytes that they may take there."""

    folder: Path
    max_bytes: int

    def describe(self, addresses: Sequence[str]) -> list[StagedShard]:
        """The shards at these addresses; reads sizes and tags, no shard. Raises ``UserError``."""
        for address in addresses:
            require_storage_package(address)
        with ThreadPoolExecutor(_DESCRIBED_AT_ONCE) as pool:
            described = pool.map(lambda address: _try(address, lambda: describe_object(address)), addresses)
            shards = [StagedShard(self, each) for each in described]
        largest = max((shard.remote for shard in shards), key=lambda each: each.size)
        if 2 * largest.size > self.max_bytes:  # one that is read, and the next
            raise UserError(
                f"{largest.address} has {largest.size:,} bytes, and data.stage_gb = {self.max_bytes / 1e9:g} holds "
                f"fewer than two such shards; it must be at least {2 * largest.size / 1e9:.3g}"
            )
        return shards


def _try(address: str, call: Callable[[], _Result]) -> _Result:
    """The result of a call that may fail for a while. Raises ``ShardError`` naming the shard after the last attempt."""
    for attempt, seconds in enumerate((*WAITS_SECONDS, None), 1):
        try:
            return call()
        except ShardNotReadError as error:
            if error.final or seconds is None:
                times = f" ({attempt} attempts)" if attempt > 1 else ""
                raise ShardError(f"{address} cannot be read{times}: {error}") from None
            time.sleep(seconds)
    raise AssertionError("the last attempt raises")


@dataclass(frozen=True, slots=True)
class StagedShard:
    """A shard and its place on this disk; a few strings, for workers."""

    stage: ShardStage
    remote: RemoteObject

    @property
    def address(self) -> str:
        return self.remote.address

    @property
    def version(self) -> str:
        """Changes when the bytes may have changed."""
        return self.remote.version

    @property
    def path(self) -> Path:
        """Where it is, once it is fetched."""
        key = hashlib.sha256(f"{self.address}\0{self.version}".encode("utf-8", "surrogatepass")).hexdigest()[:20]
        return self.stage.folder / f"{key}.shard"

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``. Raises ``ShardError``."""
        while True:
            path = self.fetch()
            try:
                with path.open("rb") as file:  # no descriptor is kept: it holds space
                    file.seek(offset)
                    data = file.read(size)
            except FileNotFoundError:  # deleted since
                continue
            except OSError as error:
                raise ShardError(f"{self.address} cannot be read from {path}: {error.strerror or error}") from None
            if len(data) < size:
                raise ShardError(f"{self.address} ends at byte {offset + len(data)}, before {offset + size}")
            return data

    def fetch(self) -> Path:
        """The shard on this disk, fetched if it is not there. Raises ``ShardError``."""
        path = self.path
        try:
            if not _touch(path):
                self.stage.folder.mkdir(parents=True, exist_ok=True)
                with _locked(self.stage.folder / "lock"):  # one at a time, so that the limit holds
                    if not _touch(path):
                        remove_partial_files(self.stage.folder)
                        self._make_room()
                        self._download(path)
        except OSError as error:
            if is_disk_full(error):
                raise ShardError(f"no space left in {path.parent} to stage {self.address}") from None
            raise ShardError(f"{self.address} cannot be staged in {path.parent}: {error.strerror or error}") from None
        return path

    def _make_room(self) -> None:
        """Delete the least recently used shards until this one fits."""
        found = []
        for file in self.stage.folder.glob("*.shard"):
            with suppress(FileNotFoundError):
                status = file.stat()
                found.append((status.st_mtime_ns, status.st_size, file))
        taken = sum(size for _, size, _ in found) + self.remote.size
        for _, size, file in sorted(found):
            if taken <= self.stage.max_bytes:
                break
            file.unlink(missing_ok=True)
            taken -= size

    def _download(self, path: Path) -> None:
        known = path.with_suffix(".json")
        expected = str(json.loads(known.read_text())["sha256"]) if known.exists() else None
        earlier: set[str] = set()
        with replace_file(path) as part:
            sha256 = _try(self.address, lambda: self._write(part, expected, earlier))
        if not known.exists():
            write_text_file(known, json.dumps({"address": self.address, "version": self.version, "sha256": sha256}))

    def _write(self, part: Path, expected: str | None, earlier: set[str]) -> str:
        """Fetch the bytes once and return their hash. ``earlier``: the hashes of earlier attempts, since an ETag that
        is no MD5, though it looks like one, is told from damaged bytes by getting the same bytes twice."""
        sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        with part.open("wb") as file:
            for block in read_blocks(self.address):
                file.write(block)
                sha256.update(block)
                md5.update(block)
                size += len(block)
        found = sha256.hexdigest()
        if size != self.remote.size:
            raise self._refused(f"{size:,} bytes came, of {self.remote.size:,}")
        if expected not in (None, found):
            raise self._refused("its bytes are not those it had when it was first read, under the same ETag")
        if expected is None and self.remote.md5 not in ("", md5.hexdigest()):
            if found not in earlier:
                earlier.add(found)
                raise self._refused("its bytes do not have the MD5 that the storage gives")
            _log.warning("%s: the storage gives another MD5 than that of its bytes, which came twice", self.address)
        return found

    def _refused(self, reason: str) -> ShardNotReadError:
        """Why fetched bytes are refused: the reason, or that another object is there by now, which none would mend."""
        if describe_object(self.address).version == self.version:
            return ShardNotReadError(reason)
        return ShardNotReadError("it was replaced after its pairs were opened; open them again", final=True)


_in_background: set[StagedShard] = set()  # that a thread of this process fetches


def fetch_in_background(shards: Sequence[StagedShard]) -> None:
    """Begin to fetch shards, one after the other, in a thread; errors are left to ``StagedShard.fetch``."""
    missing = [shard for shard in shards if shard not in _in_background and not shard.path.exists()]
    if missing:
        _in_background.update(missing)
        threading.Thread(target=_fetch_all, args=(missing,), daemon=True).start()


def _fetch_all(shards: Sequence[StagedShard]) -> None:
    try:
        for shard in shards:
            with suppress(ShardError):
                shard.fetch()
            _in_background.discard(shard)
    finally:
        _in_background.difference_update(shards)


def _touch(path: Path) -> bool:
    """Whether the file exists; sets the time of its last use."""
    try:
        if time.time() - path.stat().st_mtime > _TOUCHED_SECONDS:
            os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the lock of a stage; the system releases that of a process that ends."""
    import fcntl  # not on every system

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
