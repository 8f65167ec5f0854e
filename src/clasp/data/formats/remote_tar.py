"""Webdataset tars on object storage: indexed once, their captions kept on this disk, their images read from the stage.

Input: a ``StagedShard``. Output: its samples as pairs. Note: a shard is fetched to be indexed, and then when its images
are read; opening it again fetches nothing, since captions and labels are part of the index. A ``classnames.txt`` beside
a shard is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int64, UInt8

from clasp.data.formats.base import SourceSpec
from clasp.data.formats.index_cache import IndexArrays, load_or_build_index
from clasp.data.formats.name_table import NameTable
from clasp.data.formats.rows import ColumnNames
from clasp.data.formats.samples import (
    CAPTION_SUFFIXES,
    SampleTable,
    group_by_key,
    member_id,
    open_samples,
    split_member_name,
)
from clasp.data.formats.skipped_files import SkippedFiles
from clasp.data.formats.tar import scan_tar
from clasp.data.regular_file import require_size
from clasp.data.shard_stage import StagedShard, fetch_in_background
from clasp.plain_types import ImageSource

TAR_FORMAT = ".tar"


@dataclass(frozen=True, slots=True)
class RemoteTarSource:
    """``size`` bytes at ``offset`` of a staged tar; ``name`` is ``s3://…/shard.tar::member.jpg``."""

    name: str
    shard: StagedShard
    offset: int
    size: int

    @property
    def version(self) -> str:
        return f"{self.shard.version}@{self.offset}+{self.size}"

    def read(self) -> bytes:
        require_size(self.name, self.size)
        return self.shard.read(self.offset, self.size)


@dataclass(frozen=True, slots=True)
class KeptText:
    """A caption or label of a staged tar, from its index."""

    name: str
    version: str
    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True, eq=False)
class RemoteTar:
    """The regular files of a tar, in archive order; a ``FileCollection``."""

    shard: StagedShard
    names: NameTable
    offsets: Int64[np.ndarray, " members"]
    sizes: Int64[np.ndarray, " members"]
    texts: UInt8[np.ndarray, " bytes"]
    """Captions and labels, one after the other."""
    text_bounds: Int64[np.ndarray, " bounds"]
    """Where that of each member begins and ends; an image has none."""
    skipped_files: SkippedFiles

    def source(self, row: int) -> ImageSource:
        name, size = f"{self.shard.address}::{self.names[row]}", int(self.sizes[row])
        if _is_text(self.names[row]):
            data = self.texts[self.text_bounds[row] : self.text_bounds[row + 1]].tobytes()
            return KeptText(name, self.shard.version, data)
        return RemoteTarSource(name, self.shard, int(self.offsets[row]), size)


def open_remote_tar(
    shard: StagedShard, following: StagedShard | None, columns: ColumnNames, cache: Path | None
) -> SampleTable:
    """Open a shard; where it is not indexed yet it is fetched, and ``following`` meanwhile in the background."""

    def build() -> IndexArrays:
        file = shard.fetch()
        fetch_in_background([following] if following is not None else [])
        arrays = scan_tar(shard.address, file)
        names = NameTable(arrays["letters"], arrays["ends"])
        texts = list(_read_texts(shard, names, arrays))
        bounds = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return arrays | {"texts": np.frombuffer(b"".join(texts), np.uint8), "text_bounds": bounds}

    key = (shard.address, shard.version)
    arrays = load_or_build_index(cache, ("remote tar", *key), build)
    skipped = SkippedFiles.from_array(arrays["skipped"])
    names = NameTable(arrays["letters"], arrays["ends"])
    numbers = (arrays["offsets"], arrays["sizes"], arrays["texts"], arrays["text_bounds"])
    members = RemoteTar(shard, names, *numbers, skipped)
    path = nominal_path(shard.address)
    spec = SourceSpec(path, path, columns, "", cache, TAR_FORMAT, address=shard.address)

    return open_samples(
        spec,
        members,
        lambda: group_by_key(names, split_member_name, shard.address, skipped),
        member_id,
        ("remote samples", *key),
    )


def nominal_path(address: str) -> Path:
    """A path by which sources of one run are told apart, the same on every machine; nothing is there."""
    return Path("/", address)


def _is_text(name: str) -> bool:
    return PurePosixPath(name).suffix.lower().removeprefix(".") in CAPTION_SUFFIXES


def _read_texts(shard: StagedShard, names: NameTable, arrays: IndexArrays) -> Iterator[bytes]:
    """The bytes of each member that is a caption or a label, and none of an image."""
    places = zip(names, arrays["offsets"].tolist(), arrays["sizes"].tolist(), strict=True)
    for name, offset, size in places:
        if _is_text(name):
            require_size(f"{shard.address}::{name}", size)
            yield shard.read(offset, size)
        else:
            yield b""
