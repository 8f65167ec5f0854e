"""Mutated bytes: what a damaged disk, a broken exporter or an attacker may make of a file.

Input: a seed file, other seeds of its format, a random generator. Output: bytes, the same for the same generator. After
AFL's havoc stage (Zalewski, https://lcamtuf.coredump.cx/afl/technical_details.txt): one to six mutations one after
another. Ours differs in having no coverage to guide it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

MAX_BYTES = 1 << 20
TOKENS: tuple[bytes, ...] = (
    *(b"", b"\0", b"\n", b"\r\n", b"\r", b"\t", b",", b";", b'"', b"'", b"`", b"\\", b"::", b"{", b"}", b"[", b"]"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3\x28", b"\xf0\x9f\x98\x80", "\u202e\u200b".encode()),
    *(b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"1e-999", b"0x10", b"-9223372036854775808"),
    *(b"99999999999999999999999999", b"9" * 5000, b"1" + b"0" * 400, b"[" * 3000, b'{"a":' * 3000, b"(" * 3000),
    *(b"../../etc/passwd", b"/dev/zero", b"/etc/passwd", b"file:///etc/passwd", b"http://127.0.0.1:1/x.png", b"~"),
    *(b"os:abort", b"sys:exit", b"clasp_canary:run", b"{run}", b"{0..999999999}", b"${x}", b"%s%n", b"[/bold]"),
    *(b"\x1b[31m", b"\x80", b"\\ud800", b"\\u0000", b"\xf0\x9f" * 9, b"x" * 70000, b" " * 3000, b"\n" * 3000),
    *(b"PK\x03\x04", b"PAR1", b"\x1f\x8b\x08", b"ustar", b"\x80\x02", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>"),
)
_BYTES = (0, 1, 9, 10, 13, 32, 34, 44, 47, 58, 92, 127, 128, 254, 255)

_Mutation = Callable[[bytes, random.Random, Sequence[bytes]], bytes]


def mutate(seed: bytes, chance: random.Random, others: Sequence[bytes], tokens: Sequence[bytes] = ()) -> bytes:
    """One to six mutations of ``seed``; ``others`` to splice with, ``tokens`` of the format besides ``TOKENS``."""
    words = (*TOKENS, *tokens, *tokens)
    found = seed
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        mutation = chance.choice(_MUTATIONS)
        found = mutation(found, chance, words if mutation in (_insert_token, _replace_value) else others)
    return found[:MAX_BYTES]


def _place(data: bytes, chance: random.Random) -> int:
    """A place; half of the time near the start or the end, where headers and footers are."""
    if chance.random() < 0.5 or not data:
        return chance.randrange(len(data) + 1)
    near = min(len(data), chance.choice((8, 64, 512)))
    return chance.randrange(near + 1) if chance.random() < 0.5 else len(data) - chance.randrange(near + 1)


def _span(data: bytes, chance: random.Random) -> tuple[int, int]:
    start = _place(data, chance)
    return start, min(len(data), start + chance.choice((1, 2, 4, 8, 32, 200, 2000)))


def _flip_bit(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    if not data:
        return data
    place = min(_place(data, chance), len(data) - 1)
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def _set_byte(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    place = _place(data, chance)
    return data[:place] + bytes([chance.choice(_BYTES)]) + data[place + 1 :]


def _set_number(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """Two, four or eight bytes become an extreme integer."""
    place, size = _place(data, chance), chance.choice((2, 4, 8))
    number = chance.choice((0, 1, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1, 1 << 8 * size - 2))
    return data[:place] + number.to_bytes(size, chance.choice(("little", "big"))) + data[place + size :]


def _delete(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(data, chance)
    return data[:start] + data[end:]


def _repeat(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(data, chance)
    return data[:start] + data[start:end] * chance.choice((2, 2, 3, 50, 1000)) + data[end:]


def _zero(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(data, chance)
    return data[:start] + bytes(end - start) + data[end:]


def _random_bytes(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(data, chance)
    return data[:start] + chance.randbytes(end - start) + data[end:]


def _truncate(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    return data[: _place(data, chance)]


def _splice(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    other = chance.choice(others) if others else data
    return data[: _place(data, chance)] + other[_place(other, chance) :]


def _swap(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    (start, end), (other, stop) = sorted((_span(data, chance), _span(data, chance)))
    if end > other:
        return data
    return data[:start] + data[other:stop] + data[end:other] + data[start:end] + data[stop:]


def _insert_token(data: bytes, chance: random.Random, tokens: Sequence[bytes]) -> bytes:
    place = _place(data, chance)
    return data[:place] + chance.choice(tokens) + data[place:]


def _replace_value(data: bytes, chance: random.Random, tokens: Sequence[bytes]) -> bytes:
    """A word or number of a text becomes a token."""
    words = list(re.finditer(rb"[\w.+-]+", data[:20000]))
    if not words:
        return data
    word = chance.choice(words)
    return data[: word.start()] + chance.choice(tokens) + data[word.end() :]


_MUTATIONS: tuple[_Mutation, ...] = (
    *(_flip_bit, _set_byte, _set_number, _delete, _repeat, _zero, _random_bytes, _truncate, _splice, _swap),
    *(_insert_token, _replace_value, _replace_value),
)
