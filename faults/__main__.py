"""``make faults``: runs the cases, or those that are named, one after another; then writes their counts.

``python -m faults [--seed N] [--quick] [CASE ...]``. With ``--quick`` each case has a tenth of its trials, and nothing
is written. Exit code 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import clasp.commands.search
import clasp.commands.train  # noqa: F401
from faults.counts import CaseCount, record
from faults.flipped_bits import flipped_bits, flipped_bits_edge
from faults.full_disk import full_disk, read_only
from faults.killed_climb import killed_climb
from faults.killed_indexing import killed_deleting, killed_indexing
from faults.killed_optimizing import killed_optimizing
from faults.killed_process import killed_process
from faults.killed_training import killed_training
from faults.odd_inputs import CASES as ODD_INPUTS
from faults.world import World

CASES: dict[str, tuple[Callable[..., CaseCount], int]] = {
    "training": (killed_training, 50),
    "killed-process": (killed_process, 20),
    "auto": (killed_climb, 20),
    "indexing-flat": (partial(killed_indexing, engine="flat"), 50),
    "deleting-flat": (partial(killed_deleting, engine="flat"), 50),
    "bits": (flipped_bits, 200),
    "full-disk": (full_disk, 21),
    "read-only": (read_only, 10),
    **ODD_INPUTS,
}
if find_spec("qdrant_edge"):
    CASES |= {
        "indexing-edge": (partial(killed_indexing, engine="edge"), 20),
        "deleting-edge": (partial(killed_deleting, engine="edge"), 20),
        "optimizing-edge": (killed_optimizing, 20),
        "bits-edge": (flipped_bits_edge, 50),
    }
"""A case by name, with its number of trials"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    unknown = set(asked.cases) - CASES.keys()
    if unknown:
        parser.error(f"no case {sorted(unknown)[0]}; there are {', '.join(CASES)}")
    gc.freeze()
    broken = False
    with tempfile.TemporaryDirectory(prefix="clasp-faults-") as folder:
        world = World.make(Path(folder), asked.seed)
        for name in asked.cases or CASES:
            case, trials = CASES[name]
            began = time.monotonic()
            row = case(world, trials=max(3, trials // 10) if asked.quick else trials)
            seconds = time.monotonic() - began
            print(f"{name} ({seconds:.0f} s): {row.counts()}", *row.failures, sep="\n  ", file=sys.stderr, flush=True)
            broken |= bool(row.failures)
            if not asked.quick:
                record("faults", {name: row}, asked.seed, {name: seconds})
    sys.exit(broken)


if __name__ == "__main__":
    main()
