"""All trackers of a run as one: the log in its folder, and those that ``train.trackers`` names.

Input: the calls of a ``Tracker``. Output: the same calls to each. Note: an error of the run folder's tracker, such as a
full disk, ends the run. A named tracker that cannot start is an error before any compute; one that fails later (a lost
server) is reported in one line and dropped until the session ends, since the run folder has everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from clasp.types import MessageCallback, SkippedSample, Tracker, UserError


def skipped_event(sample: SkippedSample) -> dict[str, str]:
    """The event that is logged for an unreadable sample."""
    return {"event": "skipped", **sample._asdict()}


class TrackerGroup:
    """Several trackers as one; as a context manager it finishes the named ones if the run fails."""

    def __init__(self, record: Tracker, named: Mapping[str, Tracker], say: MessageCallback, step: int = 0):
        self._record, self._named, self._say = record, dict(named), say
        self._step = step

    def __enter__(self) -> TrackerGroup:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish_named([])

    def config(self, recipe: dict[str, Any]) -> None:
        """Starts every tracker. Raises ``UserError`` naming the one that cannot start."""
        self._record.config(recipe)
        for name, tracker in list(self._named.items()):
            try:
                tracker.config(recipe)
            except Exception as error:  # a service or a user's class may raise anything
                del self._named[name]
                raise UserError(
                    f"train.trackers: {name} cannot start ({_one_line(error)}); mend this, or leave {name} out: "
                    "train.trackers=[]"
                ) from error

    def log(self, metrics: Mapping[str, float | str | int], step: int) -> None:
        """Records metrics everywhere."""
        self._step = step
        self._record.log(metrics, step)
        self._each(lambda tracker: tracker.log(metrics, step))

    def log_skipped(self, samples: Iterable[SkippedSample]) -> None:
        """Log unreadable samples, as the loop does."""
        for sample in samples:
            self.log(skipped_event(sample), self._step)

    def finish(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Records the final results and ends every tracker."""
        self._record.finish(results)
        self._finish_named(results)

    def _finish_named(self, results: Sequence[Mapping[str, Any]]) -> None:
        self._each(lambda tracker: tracker.finish(results))
        self._named.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._named.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._named[name]
                self._say(
                    f"tracker {name} failed and is left out from now on ({_one_line(error)}); nothing is lost: "
                    "log.jsonl and results.jsonl have every number"
                )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
