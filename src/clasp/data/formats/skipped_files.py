"""Skipped files of a source: those that belong to no pair, counted by reason, with an example each.

Input: reasons and file names while a source is opened. Output: ``SkippedFiles``, which prints as one line. Note: names
are escaped for printing, since a file name may contain line breaks or invalid Unicode. Hidden files are not counted.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8


class SkippedKind(NamedTuple):
    """The files skipped for one reason."""

    reason: str
    files: int
    first: str
    """The name of one of them."""


@dataclass(frozen=True)
class SkippedFiles:
    """All skipped files, the most frequent reason first."""

    kinds: tuple[SkippedKind, ...] = ()

    @classmethod
    def of(cls, found: Iterable[tuple[str, str]]) -> "SkippedFiles":
        """From (reason, file name)."""
        return cls()._with(SkippedKind(reason, 1, name) for reason, name in found)

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def __add__(self, other: "SkippedFiles") -> "SkippedFiles":
        return self._with(other.kinds)

    def __str__(self) -> str:
        parts = (f"{kind.files:,} × {kind.reason} ({_first(kind)})" for kind in self.kinds)
        return f"passed over {'; '.join(parts)}" if self.kinds else "nothing passed over"

    @property
    def counts(self) -> dict[str, int]:
        """Number of files by reason."""
        return {kind.reason: kind.files for kind in self.kinds}

    def to_array(self) -> UInt8[np.ndarray, " bytes"]:
        """Serialised, for an index file."""
        return np.frombuffer(json.dumps(self.kinds).encode(), np.uint8)

    @classmethod
    def from_array(cls, saved: UInt8[np.ndarray, " bytes"]) -> "SkippedFiles":
        """Inverse of ``to_array``."""
        return cls(tuple(SkippedKind(*kind) for kind in json.loads(saved.tobytes())))

    def _with(self, more: Iterable[SkippedKind]) -> "SkippedFiles":
        kinds = {kind.reason: kind for kind in self.kinds}
        for kind in more:
            known = kinds.get(kind.reason)
            kinds[kind.reason] = kind if known is None else known._replace(files=known.files + kind.files)
        return SkippedFiles(tuple(sorted(kinds.values(), key=lambda kind: -kind.files)))


@runtime_checkable
class ReportsSkipped(Protocol):
    """An opened source that may skip files; others skip none."""

    @property
    def skipped_files(self) -> SkippedFiles: ...


def _first(kind: SkippedKind) -> str:
    return f"{'the first: ' if kind.files > 1 else ''}{escape_name(kind.first)}"


def escape_name(name: str) -> str:
    """A file name or id, with characters that are not printable escaped, for printing in one line."""
    if name.isprintable():
        return name
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )
