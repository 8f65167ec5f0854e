"""What an evaluation task is run with: a run, its model, the pairs it is evaluated on, and the options that were given.

``clasp eval`` makes one and hands it to the task's entry in ``registry``. Note: ``options`` holds those that were given
and those that have a default; one that is neither is absent.
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
    """``say`` takes lines that a person should read beside the results; ``bar`` opens progress bars."""

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
        """The pairs, as they were named: the ``data`` of every result."""
        return self.options["data"]
