"""The short half of ``make fuzz``: a few mutated inputs, and that each kind of defect is seen."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.fuzz.mutations import MAX_BYTES, mutate
from faults.fuzz.pair_readers import PAIR_READERS
from faults.fuzz.worker import REFUSED, VALUE, Reader, fuzz

from clasp.types import UserError


@pytest.mark.parametrize("name", ["jsonl", "tar"])
def test_a_mutated_input_is_read_or_refused_in_one_line(name: str):
    (reader,) = (each for each in PAIR_READERS if each.name == name)
    tally = fuzz(reader, seed=1, count=15)
    assert not tally.defects and tally.tried == 15


def test_mutations_repeat_themselves_and_are_bounded():
    made = [[mutate(b"a,b\n1,2\n" * 50, random.Random(number), [b"other"]) for number in range(300)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 250 and max(map(len, made[0])) <= MAX_BYTES


def _dies(number: int) -> str:
    os.kill(os.getpid(), signal.SIGKILL)


def _shows(number: int) -> str:
    raise [KeyError("x"), UserError("one line"), MemoryError()][number % 3]


def _takes(number: int) -> str:
    return VALUE if bytearray(1 << 31) else REFUSED


def _runs(number: int) -> str:
    os.system("true")
    return VALUE


@pytest.mark.parametrize(
    ("read", "outcomes", "defects"),
    [
        (_dies, {}, ["the process died of SIGKILL"] * 3),
        (_shows, {REFUSED: 1}, ["KeyError", "MemoryError"]),
        (_takes, {}, ["MemoryError"] * 3),
        (_runs, {}, ["runs code: os.system"] * 3),
    ],
    ids=["dies", "shows", "takes", "runs"],
)
def test_each_kind_of_defect_is_seen(read: Callable[[int], str], outcomes: dict[str, int], defects: list[str]):
    numbers = iter(range(9))

    def prepare(folder: Path) -> Callable[[random.Random, Path], str]:
        return lambda chance, scratch: read(next(numbers))

    tally = fuzz(Reader("made up", 3, prepare), seed=0, count=3)
    assert dict(tally.outcomes) == outcomes
    assert len(tally.defects) == len(defects)
    assert all(found.startswith(wanted) for found, wanted in zip(tally.defects.values(), defects, strict=True))
