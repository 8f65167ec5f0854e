"""A few pairs in memory, with pictures that can be damaged, and a word tokenizer: for tests of batches and features.

Importable by name, so that worker processes can unpickle what is defined here.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from PIL import Image

from clasp.data.images import ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.types import Caption, Pair

TRANSFORM = ImageTransform(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
WORDS = ["[PAD]", "a", "the", "cat", "dog", "two", "red", *[f"w{number}" for number in range(40)]]


@dataclass(frozen=True)
class MemorySource:
    """Bytes that count how often they are read, in this process."""

    name: str
    data: bytes
    version: str = "1"
    reads: list[str] = field(default_factory=list, compare=False)

    def read(self) -> bytes:
        self.reads.append(self.name)
        return self.data


@dataclass(frozen=True)
class SlowSource:
    """A disk that does not answer."""

    name: str = "slow"
    version: str = "1"

    def read(self) -> bytes:
        time.sleep(60)
        raise AssertionError("waited for after all")


@dataclass(frozen=True)
class MissingSource:
    path: Path
    version: str = "1"

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        return self.path.read_bytes()


def png(number: int) -> bytes:
    """A picture that differs for every number."""
    picture = Image.new("RGB", (12, 10))
    picture.putdata([((number * 37 + x * x) % 256, (number * 11 + x) % 256, (x * 5) % 256) for x in range(120)])
    out = io.BytesIO()
    picture.save(out, "png")
    return out.getvalue()


def small_pairs(
    count: int, *, damaged: frozenset[int] | set[int] = frozenset(), captions: int = 3, version: str = "1"
) -> list[Pair]:
    """``pair i`` has 1 to ``captions`` captions; pairs 2k and 2k + 1 are one group."""
    pairs: list[Pair] = []
    for number in range(count):
        source = MemorySource(f"{number}.png", b"not a picture" if number in damaged else png(number), version)
        texts = [f"a w{(number + 7 * i) % 40} " + "red " * i for i in range(number % captions + 1)]
        pairs.append(Pair(f"pair {number}", source, tuple(Caption(text) for text in texts), f"group {number // 2}"))
    return pairs


def word_tokenizer() -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[PAD]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend)
