"""The arguments of an evaluation task: a run, its model, the pairs it is evaluated on, and the options.

``clasp eval`` creates one and passes it to the task's entry in ``registry``. Note: ``options`` has the given options
and those with a default; others are absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clasp.config.recipe import Recipe
from clasp.data.pairs import Pairs
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.types import MessageCallback, ProgressFactory


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """``say`` is called with status lines beside the results; ``bar`` opens progress bars."""

    run: Path
    recipe: Recipe
    model: DualEncoder
    pairs: Pairs
    inputs: FeatureSource
    options: Mapping[str, str]
    say: MessageCallback
    bar: ProgressFactory

    @property
    def data(self) -> str:
        """The name of the pairs as given: the ``data`` of every result."""
        return self.options["data"]
