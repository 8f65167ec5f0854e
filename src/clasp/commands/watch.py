"""The command ``clasp watch``: keep the index of a run as a folder is, until it is interrupted.

Input: a run folder and a folder of images. Output: a line for each change of the index. Note: the folder is listed
again and again (names, sizes and times; nothing is read), ever more seldom while nothing changes. A folder that is
missing or has no images is waited for, and nothing is dropped: it may be a disk that is not mounted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clasp.commands.search import index_images
from clasp.commands.search_model import find_search_model
from clasp.data.pairs import list_images
from clasp.plain_types import MessageCallback, ProgressFactory, UserError, no_progress_bar

_LISTING_SHARE = 10  # waits are at least so many times as long as listing the folder takes


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """Seconds between two listings, and the engine of a new index. ``sleep`` waits so long."""

    shortest: float = 1.0
    longest: float = 30.0
    store: str | None = None
    sleep: Callable[[float], None] = time.sleep


def watch_folder(
    run: Path,
    folder: str,
    settings: WatchSettings,
    *,
    say: MessageCallback,
    bar: ProgressFactory = no_progress_bar,
) -> None:
    """Index what is new, drop what is gone, until ``KeyboardInterrupt``. ``UserError`` if the first indexing fails."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; clasp watch follows a folder of images")
    model, seen, wait, problem = find_search_model(run)(), None, settings.shortest, ""
    try:
        while True:
            started = time.monotonic()
            listed, reason = _listing(folder)
            took = time.monotonic() - started
            if listed is not None and listed != seen:
                wait = settings.shortest
                try:
                    done = index_images(run, folder, bar=bar, model=model, store=settings.store, say=say)
                    if seen is None or done.added or done.removed or done.renamed or done.skipped:
                        say(str(done))
                    seen = listed
                except UserError as error:
                    if seen is None:
                        raise
                    reason = str(error)
            else:
                wait = min(2 * wait, settings.longest)
            if reason and reason != problem:
                say(f"waiting: {reason}")
            problem = reason
            settings.sleep(max(wait, _LISTING_SHARE * took))
    except KeyboardInterrupt:
        say(f"stopped; the index is as {folder} was at the last line")


def _listing(folder: str) -> tuple[frozenset[tuple[str, str]] | None, str]:
    """Name and version of every image; ``None`` and the reason where there are none."""
    try:
        return frozenset((name, source.version) for name, source in list_images(folder)), ""
    except UserError as error:
        return None, str(error)
