"""``make fuzz``: 100,000 mutated inputs over every reader; then writes their counts.

``python -m faults.fuzz [--seed N] [--fraction F] [--first N] [READER ...]``. With a fraction other than 1, or
``--first``, nothing is written. Exit code 1 where there is a defect; each is printed with the number that repeats it:
``python -m faults.fuzz READER --seed SEED --first NUMBER``.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

from faults.counts import CaseCount, record
from faults.fuzz.model_readers import MODEL_READERS
from faults.fuzz.pair_readers import PAIR_READERS
from faults.fuzz.worker import Reader, Tally, fuzz

READERS: dict[str, Reader] = {reader.name: reader for reader in (*PAIR_READERS, *MODEL_READERS)}
_PROMISE = "a value, one line that refuses, or a counted bad sample; no traceback, hang, code run or gigabyte"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m faults.fuzz", description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the inputs")
    parser.add_argument("--first", type=int, default=None, help="one input alone, by its number")
    asked = parser.parse_args()
    unknown = set(asked.readers) - READERS.keys()
    if unknown:
        parser.error(f"no reader {sorted(unknown)[0]!r}; there are {', '.join(READERS)}")
    whole = asked.fraction == 1 and asked.first is None
    gc.freeze()
    broken = False
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name in asked.readers or READERS:
            began = time.monotonic()
            count = 1 if asked.first is not None else max(1, round(READERS[name].inputs * asked.fraction))
            tally = _in_parallel(pool, name, asked.seed, count, asked.first or 0)
            seconds = time.monotonic() - began
            row = _row(name, tally)
            print(f"{name} ({seconds:.0f} s, {tally.peak_bytes / 1e6:.0f} MB): {row.counts()}", file=sys.stderr)
            print(*(f"  {line}" for line in row.failures[:30]), sep="\n", file=sys.stderr, flush=True)
            broken |= bool(row.failures)
            if whole:
                record("fuzz", {name: row}, asked.seed, {name: seconds})
    sys.exit(broken)


def _in_parallel(pool: ProcessPoolExecutor, name: str, seed: int, count: int, first: int) -> Tally:
    """The inputs, in as many parts as there are processors."""
    parts = max(1, min(len(os.sched_getaffinity(0)), count // 100))
    bounds = [first + count * part // parts for part in range(parts + 1)]
    done = [pool.submit(_fuzz, name, seed, end - start, start) for start, end in pairwise(bounds)]
    whole = Tally()
    for part in (each.result() for each in done):
        whole.outcomes += part.outcomes
        whole.defects |= part.defects
        whole.peak_bytes = max(whole.peak_bytes, part.peak_bytes)
    return whole


def _fuzz(name: str, seed: int, count: int, first: int) -> Tally:
    return fuzz(READERS[name], seed, count, first)


def _row(name: str, tally: Tally) -> CaseCount:
    defects = tuple(f"{name} {number}: {defect}" for number, defect in sorted(tally.defects.items()))
    return CaseCount(f"mutated {name}", _PROMISE, name, tally.tried, dict(tally.outcomes), defects)


if __name__ == "__main__":
    main()
