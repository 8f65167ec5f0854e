"""A compact table of strings: one array of bytes, and the end offset of each string.

Input: file names. Output: a sequence of them by number. Note: a list of a million Python strings takes a hundred
megabytes and is slow to pickle for a worker; this takes 8 bytes a name beyond the names themselves.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8


@dataclass(frozen=True, eq=False)
class NameTable:
    """Strings by number."""

    letters: UInt8[np.ndarray, " bytes"]
    ends: Int64[np.ndarray, " names"]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "NameTable":
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        letters = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(letters, np.cumsum([len(text) for text in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        start = int(self.ends[number - 1]) if number else 0
        return self.letters[start : int(self.ends[number])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))
