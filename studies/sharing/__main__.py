"""``python -m studies.sharing``: run the missing cells, then write the page and its figure.

Input: the folders of the photos and of the emoji corpus. Output: lines in ``results/``, README.md and sharing.png. It
may be interrupted at any time, and resumes with the next missing cell. ``--speed`` times a few steps of every row
instead: on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clasp.commands.environment import configure_environment

configure_environment()  # before torch is imported

HERE = Path(__file__).parent


def main(given: Sequence[str] | None = None, home: Path = HERE) -> None:
    """The command; ``home`` is the folder of the page, with the results in it."""
    from clasp.types import UserError

    parser = argparse.ArgumentParser(prog="python -m studies.sharing", description=__doc__)
    parser.add_argument("--photos", type=Path, help="the folder that holds tinyimagenet")
    parser.add_argument("--emoji", type=Path, help="folder of the emoji corpus")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument(
        "--part", type=Part.read, default=Part(1, 1), metavar="I/N", help="of the cells, for one of N processes"
    )
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
    from studies.records import Results
    from studies.sharing import figure, page
    from studies.sharing.cells import run
    from studies.sharing.datasets import World
    from studies.sharing.grid import SCRATCH, Cell, cells, to_time

    results = Results(home / "results")

    def find(cell: Cell) -> dict | None:
        return results.get(cell.key)

    if not options.page:
        for name in ("photos", "emoji"):
            _refuse_missing(name, getattr(options, name))
        world, began = World(options.photos, options.emoji), time.monotonic()
        while time.monotonic() - began < 60 * options.minutes:
            results = Results(home / "results")  # read again: other processes write too
            wanted = to_time(SCRATCH) if options.speed else cells(SCRATCH, find)
            left = [cell for cell in wanted if find(cell) is None and options.part.takes(cell.key)]
            if not left:
                break
            print(f"{time.strftime('%H:%M:%S')} {left[0]}", flush=True)
            record = run(left[0], world, results)
            print(f"         {record['seconds']} {record.get('validation', '')}", flush=True)
    print(page.write(SCRATCH, find, home))
    if drawn := figure.draw(SCRATCH, find, home):
        print(drawn)


@dataclass(frozen=True)
class Part:
    """The cells of one of several parallel processes: every ``of``-th by key."""

    number: int
    of: int

    @classmethod
    def read(cls, text: str) -> Part:
        """Parse ``1/2``; raises argparse's error otherwise."""
        number, _, of = text.partition("/")
        if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a part, such as 1/2: the first of two")
        return cls(int(number), int(of))

    def takes(self, key: str) -> bool:
        return int(key, 16) % self.of == self.number - 1


def _refuse_missing(name: str, folder: Path | None) -> None:
    from clasp.types import UserError

    if folder is None:
        raise UserError(f"--{name} FOLDER is needed where cells are to be run")
    if not folder.is_dir():
        raise UserError(f"--{name} {folder} is not a folder")


if __name__ == "__main__":
    main()
