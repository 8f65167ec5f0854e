"""The tracker registry, and the trackers of a run.

Input: the names in ``train.trackers``. Output: one ``Tracker`` that writes to the run folder and to the named trackers.
Note: where several processes train, only the first records; the others have ``silent_trackers``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from clasp.training.trackers.group import TrackerGroup
from clasp.training.trackers.jsonl import AppendFunction, JsonLinesTracker
from clasp.types import MessageCallback, TrackedRun, Tracker, UserError

TrackerFactory = Callable[[TrackedRun], object]

_ACCELERATE = "clasp.training.trackers.accelerate_trackers"
# the key is also the name of the package that it needs and of the extra that installs it
TRACKERS = {
    "tensorboard": f"{_ACCELERATE}:TensorBoardTracker",
    "wandb": f"{_ACCELERATE}:WandbTracker",
    "mlflow": f"{_ACCELERATE}:MLflowTracker",
    "trackio": f"{_ACCELERATE}:TrackioTracker",
}


def check_tracker_names(names: Sequence[str]) -> None:
    """``UserError`` for a name that is neither in the table nor of the form package.module:Name. Imports nothing."""
    for name in names:
        if name not in TRACKERS and ":" not in name:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"train.trackers: unknown tracker {name!r}; {hint}trackers: {', '.join(TRACKERS)}, package.module:Name"
            )


def find_trackers(names: Sequence[str]) -> dict[str, TrackerFactory]:
    """The class of each tracker. Raises ``UserError`` for one that is unknown or whose package is not installed."""
    check_tracker_names(names)
    for name in names:
        if name in TRACKERS and not _is_installed(name):
            raise UserError(f"train.trackers: {name} is not installed; type: pip install 'clasp-vl[{name}]'")
    return {name: _import_tracker(TRACKERS.get(name, name)) for name in names}


def open_trackers(
    factories: Mapping[str, TrackerFactory], run: TrackedRun, append: AppendFunction, say: MessageCallback
) -> TrackerGroup:
    """The trackers of a run, not started yet; ``append`` adds rows to a file of its folder."""
    made: dict[str, Tracker] = {}
    for name, factory in factories.items():
        tracker = factory(run)
        if not isinstance(tracker, Tracker):
            raise UserError(
                f"train.trackers: {name} gave a {type(tracker).__name__}, not a clasp.types.Tracker: it needs the "
                "methods config, log and finish"
            )
        made[name] = tracker
    return TrackerGroup(JsonLinesTracker(append, run.folder), made, say, run.step)


def silent_trackers() -> TrackerGroup:
    """Trackers that record nothing."""
    return TrackerGroup(JsonLinesTracker(lambda name, rows: None), {}, lambda line: None)


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # no origin: a folder of that name, such as wandb writes


def _import_tracker(name: str) -> TrackerFactory:
    """What ``package.module:Name`` names; errors inside the user's code are not caught."""
    module, _, attribute = name.partition(":")
    try:
        found = vars(importlib.import_module(module))
    except (ModuleNotFoundError, ValueError) as error:
        raise UserError(f"train.trackers: {name!r}: {error}; is its folder on PYTHONPATH?") from None
    factory = found.get(attribute)
    if not callable(factory):
        near = difflib.get_close_matches(attribute, (key for key, value in found.items() if callable(value)), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"train.trackers: {name!r}: {module} has no class {attribute!r}{hint}")
    return factory
