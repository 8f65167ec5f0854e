"""What a source passed over: files that became part of no pair, counted by reason, each with a first example.

Goes in: reasons and names while a source is opened. Comes out: ``SkippedFiles``, which prints as one line.
Note: names are escaped for printing, since a file name need be neither Unicode nor one line. Hidden files are not
counted.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8


class SkippedKind(NamedTuple):
    """Files passed over for one reason."""

    reason: str
    files: int
    first: str
    """The name of one of them."""


@dataclass(frozen=True)
class SkippedFiles:
    """All that was passed over, the commonest reason first."""

    kinds: tuple[SkippedKind, ...] = ()

    @classmethod
    def of(cls, found: Iterable[tuple[str, str]]) -> "SkippedFiles":
        """From reasons with names."""
        return cls()._with(SkippedKind(reason, 1, name) for reason, name in found)

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def __add__(self, other: "SkippedFiles") -> "SkippedFiles":
        return self._with(other.kinds)

    def __str__(self) -> str:
        said = (f"{kind.files:,} × {kind.reason} ({_first(kind)})" for kind in self.kinds)
        return f"passed over {'; '.join(said)}" if self.kinds else "nothing passed over"

    @property
    def counts(self) -> dict[str, int]:
        """How many by reason."""
        return {kind.reason: kind.files for kind in self.kinds}

    def to_array(self) -> UInt8[np.ndarray, " bytes"]:
        """As an index keeps it."""
        return np.frombuffer(json.dumps(self.kinds).encode(), np.uint8)

    @classmethod
    def from_array(cls, saved: UInt8[np.ndarray, " bytes"]) -> "SkippedFiles":
        """The reverse of ``to_array``."""
        return cls(tuple(SkippedKind(*kind) for kind in json.loads(saved.tobytes())))

    def _with(self, more: Iterable[SkippedKind]) -> "SkippedFiles":
        kinds = {kind.reason: kind for kind in self.kinds}
        for kind in more:
            known = kinds.get(kind.reason)
            kinds[kind.reason] = kind if known is None else known._replace(files=known.files + kind.files)
        return SkippedFiles(tuple(sorted(kinds.values(), key=lambda kind: -kind.files)))


@runtime_checkable
class ReportsSkipped(Protocol):
    """A source that may pass files over; one without this passes none over."""

    @property
    def skipped_files(self) -> SkippedFiles: ...


def _first(kind: SkippedKind) -> str:
    return f"{'the first: ' if kind.files > 1 else ''}{escape_name(kind.first)}"


def escape_name(name: str) -> str:
    """A file name or an id as it can be printed in one line: what is no printable character is escaped."""
    if name.isprintable():
        return name
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )
