"""What every exporter takes and returns: a run with its model and recipe, the options, and a report.

Input: a run folder. Output: ``ExportJob``, whose model computes in float32 on the CPU. Note: real inputs
(``check_inputs``) are the validation pairs of the run, or, where these cannot be read on this machine, pairs of the
packaged sample; the report names which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clasp.config.build import load
from clasp.config.datasets import open_pairs_for_recipe, open_training_pairs
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.data.images import ImageError
from clasp.data.pairs import Pairs
from clasp.data.shard_stage import ShardError
from clasp.models.dual_encoder import DualEncoder
from clasp.models.inference import EmbeddingModel
from clasp.training.run_folder import RunFolder
from clasp.types import MessageCallback, UserError

_SAMPLE = "sample:emoji-quick/val"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of ``clasp export`` beyond format and folder; ``None``: not given."""

    quantize: Literal["int8"] | None = None
    """``onnx``: also write graphs with int8 weights"""
    push: str | None = None
    """``hub``: the repository to upload the folder to"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """A run to export. ``model`` is loaded for this job alone, so an exporter may change it."""

    run: Path
    recipe: Recipe
    model: EmbeddingModel
    options: ExportOptions
    say: MessageCallback

    @property
    def encoder(self) -> DualEncoder:
        """Towers and heads."""
        assert isinstance(self.model.encoder, DualEncoder)
        return self.model.encoder

    def check_inputs(self, count: int) -> CheckInputs:
        """At most ``count`` encoded images with their first captions."""
        name, pairs = self._pairs()
        images, captions = [], []
        for number in range(len(pairs)):
            pair = pairs[number]
            try:
                encoded = pair.image.read()
                self.model.transform(encoded)
            except ShardError:
                raise
            except (ImageError, OSError, UserError):
                continue  # as in an evaluation: an image that cannot be read is left out
            images.append(encoded)
            captions.append(pair.captions[0].text)
            if len(images) == count:
                break
        return CheckInputs(name, images, captions)

    def _pairs(self) -> tuple[str, Pairs]:
        if self.recipe.data.train is not None:
            try:
                _, val = open_training_pairs(self.recipe)
                if len(val) > 1:
                    return "validation pairs of the run", val
            except UserError:
                self.say(f"the pairs of {self.run} cannot be read here; checked on {_SAMPLE} instead")
        return _SAMPLE, open_pairs_for_recipe(_SAMPLE, self.recipe)


@dataclass(frozen=True, slots=True)
class CheckInputs:
    """Real inputs: encoded images and as many captions, and the name of where they come from."""

    name: str
    images: list[bytes]
    captions: list[str]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an exporter reports: lines to print, and measured numbers by name."""

    lines: list[str]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExportTarget:
    """A row of ``clasp.commands.export.EXPORTERS``."""

    export: Callable[[ExportJob, Path], ExportReport]
    """Writes the folder (it exists and is empty). Raises ``UserError`` where the run has no such form"""
    options: frozenset[str] = frozenset()
    """The fields of ``ExportOptions`` that apply"""
    check: Callable[[ExportOptions], None] | None = None
    """Called before the model is loaded. Raises ``UserError`` for a missing package or token"""


def open_job(run: Path, options: ExportOptions, say: MessageCallback) -> ExportJob:
    """The run with its model loaded. Raises ``UserError``."""
    recipe = recipe_from_dict(RunFolder(run).recipe(), str(run / "recipe.toml"))
    return ExportJob(run=run, recipe=recipe, model=load(run, precision="float32"), options=options, say=say)
