"""``python -m studies.sharing``: run the cells that are missing, then make the page and its figure.

In: the folders of the photos and of the emoji corpus. Out: lines in ``results/``, README.md and sharing.png. It may be
stopped at any time, and goes on with the next cell that is not there. Speed is in the table too: run it when the
machine has nothing else to do.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from clasp.machine import settle

settle()  # before torch is imported

HERE = Path(__file__).parent


def main(given: Sequence[str] | None = None, home: Path = HERE) -> None:
    """The command; ``home`` is the folder of the page, with the results in it."""
    from clasp.types import UserError

    parser = argparse.ArgumentParser(prog="python -m studies.sharing", description=__doc__)
    parser.add_argument("--photos", type=Path, help="the folder that holds tinyimagenet")
    parser.add_argument("--emoji", type=Path, help="folder of the emoji corpus")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--page", action="store_true", help="run nothing, make the page of what is there")
    options = parser.parse_args(given)
    try:
        study(options, home)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")


def study(options: argparse.Namespace, home: Path) -> None:
    """Run, and write the page; raises ``UserError`` where the folder of the data is not there."""
    from studies.records import Results
    from studies.sharing import figure, page
    from studies.sharing.cells import run
    from studies.sharing.rows import SCRATCH, TRUNKS, Cell, cells
    from studies.sharing.world import World

    results = Results(home / "results")
    rows = (*SCRATCH, *TRUNKS)

    def find(cell: Cell) -> dict | None:
        return results.get(cell.key)

    if not options.page:
        for name in ("photos", "emoji"):
            _refuse_missing(name, getattr(options, name))
        world, began = World(options.photos, options.emoji), time.monotonic()
        while left := [cell for cell in cells(rows, find) if find(cell) is None]:
            if time.monotonic() - began > 60 * options.minutes:
                break
            print(f"{time.strftime('%H:%M:%S')} {left[0]}", flush=True)
            record = run(left[0], world, results)
            print(f"         {record['seconds']} {record.get('validation', '')}", flush=True)
    print(page.write(rows, find, home))
    if drawn := figure.draw(rows, find, home):
        print(drawn)


def _refuse_missing(name: str, folder: Path | None) -> None:
    from clasp.types import UserError

    if folder is None:
        raise UserError(f"--{name} FOLDER is needed where cells are to be run")
    if not folder.is_dir():
        raise UserError(f"--{name} {folder} is not a folder")


if __name__ == "__main__":
    main()
