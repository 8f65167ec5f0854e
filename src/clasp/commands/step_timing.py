"""The measured time of a recipe on this machine: a few steps on real batches, and one evaluation.

Input: a recipe and its pairs. Output: ``StepTiming``. Note: the model is built, trained for a few steps and discarded
(so ``features`` come before ``steps``); nothing is written but what it puts in the feature cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from accelerate import PartialState

from clasp.commands.run_context import resolve_recipe
from clasp.config.auto_plan import StepTiming
from clasp.config.build import build_feature_source, build_model_and_preprocessing
from clasp.config.datasets import TrainValPairs, plan_run
from clasp.config.recipe import Recipe
from clasp.data.loader import BadSampleLimit, PairLoader
from clasp.data.readers import LiveImageReader, PairIndex
from clasp.evaluation.from_pairs import validation_task
from clasp.models.precision import resolve_precision
from clasp.training.attention_kernel import use_attention_kernel
from clasp.training.loop import FitCallbacks, fit
from clasp.training.losses import build_loss
from clasp.training.pooled_features import PairFeatures
from clasp.training.warm_start import load_initial_weights
from clasp.types import Batch, ProgressFactory

_STEPS = 6  # the first ones, which choose a micro-batch and fill caches, are not counted
_COUNTED = 4
_FEATURES = 128  # pairs whose features are timed


class StepTimer:
    """The model of a recipe with its pairs. ``cache``: another folder for features than the usual."""

    def __init__(self, recipe: Recipe, pairs: TrainValPairs, bar: ProgressFactory, *, cache: Path | None = None):
        train = pairs[0]
        self._recipe, self._index = recipe, PairIndex(train)
        parts = build_model_and_preprocessing(recipe, lambda: self._index.texts)
        if recipe.train.init_from is not None:
            load_initial_weights(parts.model, recipe.to_dict())
        parts.model.to(PartialState().device).eval()
        self._model, self._pairs = parts.model, pairs
        self._inputs = build_feature_source(parts, recipe, bar=bar, cache=cache)
        plan = plan_run(recipe, train, self._inputs)
        self._batch_size, self._resolved = plan.batch_size, resolve_recipe(recipe, plan, parts.model)

    def features(self) -> float:
        """Seconds of the pooled features of all pairs, from those of the first ones."""
        sides = self._inputs.batch_reader(self._pairs[0], self._index, None)
        numbers = np.arange(min(_FEATURES, len(self._index)))
        precision = resolve_precision(self._recipe.train.precision, next(self._model.parameters()).device).precision
        tally = BadSampleLimit(len(self._index), self._recipe.data.max_bad_fraction)
        began = time.perf_counter()
        PairFeatures(self._model, sides, self._index, tally, precision).rows(numbers, 0)
        return (time.perf_counter() - began) * len(self._index) / len(numbers)

    def steps(self) -> StepTiming:
        """Median seconds of a step with its data, of an evaluation, and of all features; the steps of an epoch."""
        recipe, model = self._recipe, self._model
        sides = self._inputs.batch_reader(self._pairs[0], self._index, recipe.data.augment)
        task = validation_task(*self._pairs, self._inputs)
        batches = PairLoader(
            sides,
            batch_size=self._batch_size,
            seed=recipe.train.seed,
            workers=recipe.train.workers if isinstance(sides.image, LiveImageReader) else 0,
            captions=recipe.data.captions,
            max_bad_fraction=recipe.data.max_bad_fraction,
        )
        attention = self._resolved.train.attention
        assert attention != "auto"
        with closing(batches), use_attention_kernel(attention):
            task(model)  # computes the features of its captions, once in a run
            began = time.perf_counter()
            task(model)
            evaluation = time.perf_counter() - began
            features = self.features()
            few = _FirstBatches(batches)
            settings = self._resolved.train.model_copy(
                update={"epochs": -(-_STEPS // len(few)), "max_steps": None, "select": "last"}
            )
            callbacks = FitCallbacks(tracker=_NoTracker())
            fitted = fit(model, few, build_loss(recipe.loss), settings, callbacks, kinds=model.parameter_kinds)
            if fitted.interrupted:
                raise KeyboardInterrupt
        return StepTiming(few.seconds, evaluation, len(batches), features)


class _FirstBatches:
    """The first batches of an epoch, each timed from its request to the next: reading and step."""

    def __init__(self, batches: PairLoader):
        self._batches = batches
        self._cycles: list[float] = []

    def __len__(self) -> int:
        return min(_STEPS, len(self._batches))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        began = time.perf_counter()
        for batch in islice(self._batches.epoch(number, start=start), len(self)):
            yield batch
            ended = time.perf_counter()
            self._cycles.append(ended - began)
            began = ended

    @property
    def seconds(self) -> float:
        """Median seconds of the last steps."""
        return median(self._cycles[-_COUNTED:])


class _NoTracker:
    """A ``Tracker`` that records nothing."""

    def config(self, recipe: dict[str, Any]) -> None: ...

    def log(self, metrics: Mapping[str, float | str | int], step: int) -> None: ...

    def finish(self, results: Sequence[Mapping[str, Any]]) -> None: ...
