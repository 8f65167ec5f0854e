"""The arguments of an evaluation task: a model, the pairs it is evaluated on, and the options.

``clasp eval`` creates one and passes it to the task's entry in ``registry``. Note: ``options`` has the given options
and those with a default; others are absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clasp.config.recipe import Recipe
from clasp.data.pairs import Pairs
from clasp.evaluation.embedding_table import EvaluationInputs
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.types import Encoder, MessageCallback, ProgressFactory


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The run that a model comes from, for tasks on its towers and its recipe (``TaskEntry.needs_run``)."""

    folder: Path
    recipe: Recipe
    model: DualEncoder
    inputs: FeatureSource


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """The model with its inputs, and the pairs.

    ``open_pairs`` opens further pairs as ``pairs`` were opened, with the same columns. ``run`` is ``None`` where the
    model is not a run's. ``model`` keeps the embeddings of live images by their bytes (``EncodeOnce``): a task that
    changes weights reads them anew through ``run.model``. ``say`` is called with status lines beside the results;
    ``bar`` opens progress bars.
    """

    model: Encoder
    inputs: EvaluationInputs
    pairs: Pairs
    open_pairs: Callable[[str], Pairs]
    options: Mapping[str, str]
    run: TrainedRun | None
    say: MessageCallback
    bar: ProgressFactory

    @property
    def data(self) -> str:
        """The name of the pairs as given: the ``data`` of every result."""
        return self.options["data"]
