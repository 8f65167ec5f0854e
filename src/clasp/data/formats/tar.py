"""Random access to a tar: an index of its members from one scan of the headers.

Input: an uncompressed tar. Output: names, offsets and sizes of its regular files. Note: ``tarfile`` finds the members
(PAX and GNU long names, hard links), but takes a damaged header for the end of the archive. So the end is checked here
as well: a tar that is truncated or damaged anywhere is an error with the byte position.
"""

import os
import tarfile
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from clasp.data.formats.index_cache import IndexArrays, file_stamp, load_or_build_index
from clasp.data.formats.name_table import NameTable
from clasp.data.formats.skipped_files import SkippedFiles
from clasp.data.formats.sources import TarSource
from clasp.plain_types import UserError


@dataclass(frozen=True, eq=False)
class TarFiles:
    """The regular files of a tar, in archive order."""

    path: str
    """The path the user gave; a ``.tar.gz`` is unpacked to ``file``."""
    file: str
    stamp: str
    names: NameTable
    offsets: Int64[np.ndarray, " members"]
    sizes: Int64[np.ndarray, " members"]
    skipped_files: SkippedFiles
    shard: None = None

    def source(self, row: int) -> TarSource:
        name = f"{self.path}::{self.names[row]}"
        return TarSource(name, self.file, self.stamp, int(self.offsets[row]), int(self.sizes[row]))


def open_tar(path: Path, file: Path, cache: Path | None) -> TarFiles:
    """Index ``file`` (``path`` in errors). ``UserError`` when the tar is truncated or damaged."""
    stamp = file_stamp(file)
    arrays = load_or_build_index(cache, ("tar", str(path.resolve()), stamp), lambda: scan_tar(path, file))
    names = NameTable(arrays["letters"], arrays["ends"])
    skipped = SkippedFiles.from_array(arrays["skipped"])
    return TarFiles(str(path), str(file.absolute()), stamp, names, arrays["offsets"], arrays["sizes"], skipped)


def scan_tar(path: Path | str, file: Path) -> IndexArrays:
    """Names, offsets and sizes of the files in a tar. ``path``: its name in errors."""
    names: list[str] = []
    devices: list[tuple[str, str]] = []
    offsets, sizes = array("q"), array("q")
    links: dict[int, str] = {}
    length, end = os.path.getsize(file), 0
    with suppress(tarfile.TarError), tarfile.open(file, "r:") as tar:  # _check_end reports the cause of a TarError
        while member := _next_member(tar):
            name = member.name.removeprefix("./")
            if member.issym() or member.issparse():
                raise UserError(f"{path}: member {name!r} is a link or sparse; write the tar anew with whole files")
            if member.isfile() and member.offset_data + member.size > length:
                raise UserError(f"{path} is truncated: it ends at byte {length}, inside its member {name!r}")
            if member.islnk():
                links[len(names)] = member.linkname.removeprefix("./")
            if member.isfile() or member.islnk():
                names.append(name)
                offsets.append(member.offset_data)
                sizes.append(member.size)
            elif not member.isdir():
                devices.append(("member that is not a file", name))
        end = tar.offset
    _check_end(path, file, end, names)
    rows = {name: row for row, name in enumerate(names)} if links else {}
    for row, name in links.items():  # a hard link is a second name for the bytes of an earlier member
        if name not in rows:
            raise UserError(f"{path}: member {names[row]!r} is a link to {name!r}, which is not in the tar")
        offsets[row], sizes[row] = offsets[rows[name]], sizes[rows[name]]
    packed = NameTable.of(names)
    return {
        "letters": packed.letters,
        "ends": packed.ends,
        "offsets": np.array(offsets, np.int64),
        "sizes": np.array(sizes, np.int64),
        "skipped": SkippedFiles.of(devices).to_array(),
    }


def _next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # else it retains every member
    try:
        return tar.next()
    except tarfile.TarError:
        return None


def _check_end(path: Path | str, file: Path, end: int, names: list[str]) -> None:
    """A complete tar has a block of zeros in place of the next header, and only zeros after it."""
    with file.open("rb") as handle:
        handle.seek(end)
        block = handle.read(tarfile.BLOCKSIZE)
        has_trailing_data = False
        while chunk := handle.read(1 << 20):
            has_trailing_data |= bool(chunk.strip(b"\0"))
    length = os.path.getsize(file)
    after = f"after its member {names[-1]!r}" if names else "before its first member"
    if len(block) < tarfile.BLOCKSIZE:
        raise UserError(f"{path} is truncated: it ends at byte {length}, {after}, without the mark that ends a tar")
    if any(block):
        if not names and block[257:262] != b"ustar":
            raise UserError(f"{path} is not a tar: there is no header at its start")
        raise UserError(f"{path} is truncated or damaged: no whole header at byte {end} of {length}, {after}")
    if has_trailing_data:
        raise UserError(f"{path} goes on behind its end mark at byte {end}; give joined tars apart, as a.tar::b.tar")
