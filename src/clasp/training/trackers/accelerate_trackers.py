"""TensorBoard, Weights & Biases, MLflow and trackio, through accelerate's trackers.

Input: the calls of a ``Tracker``. Output: curves in the service; names without a slash stay in ``log.jsonl``. A resumed
run continues the same record: its id is stored in ``trackers.json`` of the run folder. The destination is set by each
service's environment variables (``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI``, …).
Note: the packages are optional and imported by accelerate when a tracker starts, never here.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from accelerate.tracking import MLflowTracker as AccelerateMLflow
from accelerate.tracking import TensorBoardTracker as AccelerateTensorBoard
from accelerate.tracking import TrackioTracker as AccelerateTrackio
from accelerate.tracking import WandBTracker as AccelerateWandb

from clasp.data.atomic_files import write_text_file
from clasp.types import TrackedRun

TRACKER_IDS_FILE = "trackers.json"

_PROJECT = "clasp"  # unless the service's environment variable names another


class AccelerateTracker(ABC):
    """One of accelerate's trackers as a ``Tracker``."""

    name: str

    def __init__(self, run: TrackedRun):
        self.run = run
        self._tracker: GeneralTracker | None = None
        self._step = run.step

    @abstractmethod
    def create(self, run_id: str | None) -> GeneralTracker:
        """The tracker, not started; ``run_id`` is that of the record to continue, if any."""

    @abstractmethod
    def run_id(self, tracker: GeneralTracker) -> str:
        """The id of the record, once it has started."""

    def config(self, recipe: dict[str, Any]) -> None:
        """Start the record, or continue the existing one of this run."""
        known = _read_ids(self.run.folder).get(self.name)
        tracker = self.create(known)
        tracker.start()
        self._tracker = tracker
        started = self.run_id(tracker)
        if started != known:
            _write_ids(self.run.folder, {**_read_ids(self.run.folder), self.name: started})
            tracker.store_init_configuration(dict(flatten_recipe(recipe)))

    def log(self, metrics: Mapping[str, float | str | int], step: int) -> None:
        """Record the numeric metrics."""
        self._step = step
        numbers = {name: value for name, value in metrics.items() if "/" in name and not isinstance(value, str)}
        if numbers:
            assert self._tracker is not None, "config comes first"
            self._tracker.log({self.metric_name(name): value for name, value in numbers.items()}, step=step)

    def finish(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Record the final results at the last step, and close the record."""
        if self._tracker is None:
            return
        if numbers := dict(flatten_results(results)):
            self._tracker.log({self.metric_name(name): value for name, value in numbers.items()}, step=self._step)
        self._tracker.finish()

    def metric_name(self, name: str) -> str:
        """A metric's name in characters that the service allows."""
        return name


class TensorBoardTracker(AccelerateTracker):
    """Event files in ``tensorboard/`` of the run folder: ``tensorboard --logdir runs`` shows all runs."""

    name = "tensorboard"

    def create(self, run_id: str | None) -> GeneralTracker:
        # hides what was written after the state that the run is resumed from
        purge = {} if run_id is None else {"purge_step": self.run.step + 1}
        return AccelerateTensorBoard("tensorboard", self.run.folder, **purge)

    def run_id(self, tracker: GeneralTracker) -> str:
        return "tensorboard"


class WandbTracker(AccelerateTracker):
    """Weights & Biases; ``WANDB_PROJECT`` names the project, ``WANDB_MODE=offline`` keeps all in ``wandb/`` of the run
    folder for ``wandb sync``."""

    name = "wandb"

    def create(self, run_id: str | None) -> GeneralTracker:
        resume = {} if run_id is None else {"id": run_id, "resume": "allow"}
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        return AccelerateWandb(project, name=self.run.folder.name, dir=str(self.run.folder), **resume)

    def run_id(self, tracker: GeneralTracker) -> str:
        return tracker.tracker.id  # pyright: ignore[reportAttributeAccessIssue]


class MLflowTracker(AccelerateTracker):
    """MLflow; ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` set where. Metric names cannot contain ``@``."""

    name = "mlflow"

    def create(self, run_id: str | None) -> GeneralTracker:
        return AccelerateMLflow(_PROJECT, run_id=run_id, run_name=self.run.folder.name)

    def run_id(self, tracker: GeneralTracker) -> str:
        return tracker.tracker.info.run_id  # pyright: ignore[reportAttributeAccessIssue]

    def metric_name(self, name: str) -> str:
        return name.replace("@", "_at_")


class TrackioTracker(AccelerateTracker):
    """trackio; a run is resumed by its name."""

    name = "trackio"

    def create(self, run_id: str | None) -> GeneralTracker:
        resume = {} if run_id is None else {"resume": "allow"}
        return AccelerateTrackio(_PROJECT, name=run_id or self.run.folder.name, **resume)

    def run_id(self, tracker: GeneralTracker) -> str:
        return tracker.tracker.name  # pyright: ignore[reportAttributeAccessIssue]


# --- names -----------------------------------------------------------------------------------------------------------


def flatten_results(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float | int]]:
    """Rows of ``results.jsonl`` as metrics: ``results/retrieval/recall@1``, its interval under ``…/low``, ``…/high``,
    chance under ``results/retrieval/chance/recall@1``."""
    for row in results:
        start = "/".join(filter(None, ("results", row["task"], row["language"])))
        yield from ((f"{start}/{name}", value) for name, value in row["metrics"].items())
        yield from ((f"{start}/chance/{name}", value) for name, value in row["chance"].items())
        for name, (low, high) in row["interval"].items():
            yield f"{start}/{name}/low", low
            yield f"{start}/{name}/high", high
        yield from ((f"{start}/{name}", row[name]) for name in ("n", "seconds"))


def flatten_recipe(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | int]]:
    """Settings by their dotted names; lists as JSON."""
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            yield from flatten_recipe(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str | int | float) else json.dumps(value)


# --- ids -------------------------------------------------------------------------------------------------------------


def _read_ids(folder: Path) -> dict[str, str]:
    file = folder / TRACKER_IDS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _write_ids(folder: Path, ids: Mapping[str, str]) -> None:
    write_text_file(folder / TRACKER_IDS_FILE, json.dumps(ids))
