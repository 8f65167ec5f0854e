"""``python -m studies.sharing.trunk``: one pre-trained trunk for both modalities, against two towers.

Input: the folder of the photos, and a folder for the runs. Output: lines in ``results/trunk.jsonl``, and ``trunk.md``.
It may be interrupted at any time, and resumes; several such processes share the cells. ``--test`` asks the test photos
of the finished cells that the page shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from clasp.commands.environment import configure_environment

configure_environment()  # before torch is imported

HERE = Path(__file__).parent


def main(given: Sequence[str] | None = None, home: Path = HERE) -> None:
    """The command; ``home`` is the folder of the page, with the results in it."""
    from studies.lilt.photos import Photos, Sizes
    from studies.records import Results
    from studies.sharing.trunk_cells import Study
    from studies.sharing.trunk_grid import COMMON, SIZES
    from studies.sharing.trunk_page import write

    from clasp.types import UserError

    parser = argparse.ArgumentParser(prog="python -m studies.sharing.trunk", description=__doc__)
    parser.add_argument("--photos", type=Path, help="the folder that holds tinyimagenet and cifar10")
    parser.add_argument("--runs", type=Path, help="a folder for the runs of the cells")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--test", action="store_true", help="train nothing, ask the test photos")
    options = parser.parse_args(given)
    try:
        if options.photos is not None and options.runs is not None:
            photos = Photos(options.photos, Sizes(**SIZES), file=COMMON, every=1)
            Study(photos, options.runs, home / "results").go_on(options.minutes, test=options.test)
        elif options.photos is not None or options.runs is not None or options.test:
            raise UserError("cells need --photos FOLDER and --runs FOLDER; without either, the page is made")
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    print(write(Results(home / "results").get, home))


if __name__ == "__main__":
    main()
