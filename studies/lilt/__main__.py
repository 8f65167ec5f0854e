"""``python -m studies.lilt CLAIM``: run the missing cells of a claim, then write its page and its figure.

Input: a claim and the folder of its data. Output: lines in ``results/``, and ``CLAIM.md`` and ``CLAIM.png`` made from
them. A study may be interrupted at any time, and resumes with the next missing cell. Note: timing (``--speed``) is
separate from evaluation, each row in its own process; run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from clasp.commands.environment import configure_environment

configure_environment()  # before torch is imported
# NumPy's BLAS threads busy-wait; beside torch's threads they make the linear probes ten times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

HERE = Path(__file__).parent


def main(given: Sequence[str] | None = None, home: Path = HERE) -> None:
    """The command; ``home`` is the folder of the pages, with the results in it."""
    from studies.lilt.claims import CLAIMS

    from clasp.types import UserError

    parser = argparse.ArgumentParser(prog="python -m studies.lilt", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("claim", choices=list(CLAIMS))
    parser.add_argument("--photos", type=Path, help="folder of tinyimagenet, cifar10, flickr8k-sample: not claim4")
    parser.add_argument("--emoji", type=Path, help="folder of the emoji corpus: claim4")
    parser.add_argument("--larger", action="store_true", help="8,000 pairs, three epochs, all classes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--speed", action="store_true", help="time the rows instead; on an idle machine only")
    parser.add_argument("--page", action="store_true", help="run nothing, make the page of what is there")
    options = parser.parse_args(given)
    try:
        study(options, home)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")


def study(options: argparse.Namespace, home: Path) -> None:
    """Run, and write the page; raises ``UserError`` where the data folder does not exist."""
    from studies.lilt import figures, pages
    from studies.lilt.cells import Runner
    from studies.lilt.claim_records import find
    from studies.lilt.claims import CLAIMS, LARGER, SMALL, to_time
    from studies.lilt.datasets import world
    from studies.lilt.speed import run_alone
    from studies.records import Results

    claim, size = CLAIMS[options.claim], LARGER if options.larger else SMALL
    runner = Runner(claim.world, world(claim.world, options, run=not options.page), Results(home / "results"))
    began = time.monotonic()
    while not options.page:
        left = runner.missing(to_time(claim, size) if options.speed else claim.cells(size, runner.record))
        if not left or time.monotonic() - began > 60 * options.minutes:
            break
        print(f"{time.strftime('%H:%M:%S')} {left[0]}", flush=True)
        record = run_alone(claim, left[0], runner) if options.speed else runner.run(claim.name, left[0])
        print(f"         {record.get('seconds')} {record.get('validation', '')}", flush=True)
    found = find(claim, size, runner, to_time(claim, size))
    print(pages.write(claim, size, found, home))
    if drawn := figures.draw(claim, size, found, home):
        print(drawn)


if __name__ == "__main__":
    main()
