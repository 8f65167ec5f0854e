"""The measured time of a recipe on this machine: a few steps on real batches, and one evaluation; and of a closed form.

Input: a recipe and its pairs. Output: ``StepTiming``; seconds. Note: the model is built, trained for a few steps and
discarded; nothing is written but what it puts in the feature cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState

from clasp.commands.run_context import resolve_recipe
from clasp.config.auto_plan import FEWEST_STEPS, StepTiming
from clasp.config.build import CacheFolders, build_feature_source, build_model_and_preprocessing
from clasp.config.datasets import TrainValPairs
from clasp.config.recipe import Recipe
from clasp.config.run_plan import plan_run
from clasp.data.loader import BatchReader, PairLoader
from clasp.data.readers import LiveImageReader, PairIndex, SampleIndices
from clasp.evaluation.from_pairs import validation_task, validation_texts
from clasp.models.dual_encoder import DualEncoder
from clasp.models.packed_weights import packed_weights
from clasp.models.precision import computing_in, resolve_precision
from clasp.plain_types import Precision
from clasp.training.attention_kernel import use_attention_kernel
from clasp.training.loop import BatchStream, FitCallbacks, FitOptions, fit
from clasp.training.losses import build_loss
from clasp.training.moments import WIDE
from clasp.training.pooled_features import pool_inputs
from clasp.training.warm_start import load_initial_weights
from clasp.types import Batch, ProgressFactory

TIMED_STEPS = 5  # the first ones, which choose a micro-batch and fill caches, are not counted
_COUNTED = 3
_OF_FIRST = 3  # how much longer the first may take
_FEATURES = 96  # pairs whose features are timed
_PRODUCT_ROWS = 512  # of the product that a closed form is timed by


class SlowStepError(Exception):
    """A step took so long that no more are timed. ``seconds``: of that step; ``steps``: how many would be worth it."""

    def __init__(self, seconds: float, steps: int):
        super().__init__(f"a step takes {seconds:.2g} s")
        self.seconds, self.steps = seconds, steps


def time_steps(
    recipe: Recipe,
    pairs: TrainValPairs,
    bar: ProgressFactory,
    *,
    cache: Path | None = None,
    left: float = float("inf"),
) -> StepTiming:
    """Median seconds of a step with its data, an evaluation, and the features of all pairs (0 where no tower is tuned);
    the steps of an epoch.

    ``cache``: where features are cached; by default where those of runs are. ``left``: seconds in which at least
    ``FEWEST_STEPS``, or an epoch of fewer, have to fit; ``SlowStepError`` is raised at a step that says they do not.
    """
    entered = time.perf_counter()
    train, val = pairs
    listing = PairIndex(train)
    parts = build_model_and_preprocessing(recipe, lambda: listing.texts)
    if recipe.train.init_from is not None:
        load_initial_weights(parts.model, recipe.to_dict())
    parts.model.to(PartialState().device).eval()
    inputs = build_feature_source(parts, recipe, bar=bar, folders=CacheFolders(cache))
    plan = plan_run(recipe, train, inputs)
    resolved = resolve_recipe(recipe, plan, parts.model)
    sides = inputs.batch_reader(train, listing, recipe.data.augment)
    task, encoder = validation_task(train, val, inputs), inputs.in_precision(parts.model)
    workers = recipe.train.workers if isinstance(sides.image, LiveImageReader) else 0
    batches = PairLoader(
        sides,
        batch_size=plan.batch_size,
        seed=recipe.train.seed,
        workers=workers,
        captions=recipe.data.captions,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )
    assert resolved.train.attention != "auto"
    with closing(batches), use_attention_kernel(resolved.train.attention):
        if inputs.frozen_text_part is not None:
            for texts in validation_texts(train, val):
                inputs.text_features(texts)  # computed once in a run
        began = time.perf_counter()
        task(encoder)
        evaluation = time.perf_counter() - began
        few = _FirstBatches(batches, left - (began - entered) - 2 * evaluation)  # another follows the steps of a stage
        settings = resolved.train.model_copy(
            update={"epochs": -(-TIMED_STEPS // len(few)), "max_steps": None, "select": "last"}
        )
        options = FitOptions(kinds=parts.model.parameter_kinds)
        callbacks = FitCallbacks(tracker=_NoTracker())
        if fit(parts.model, few, build_loss(recipe.loss), settings, callbacks, options).interrupted:
            raise KeyboardInterrupt
        features = 0.0
        if any(
            parameter.requires_grad
            for tower in (parts.model.image, parts.model.text)
            for parameter in tower.parameters()
        ):
            plain, images = inputs.batch_reader(train, listing, None), len(train.images.pairs)
            features = _time_features(parts.model, plain, images, recipe.train.precision)
    return StepTiming(few.seconds, evaluation, len(batches), features)


def _time_features(
    model: DualEncoder, sides: BatchReader, distinct_images: int, precision: Literal["auto"] | Precision
) -> float:
    """Seconds of the pooled features of all images and all distinct captions, from those of the first pairs."""
    index = sides.pairs
    assert isinstance(index, PairIndex)
    device, count = next(model.parameters()).device, min(_FEATURES, len(index))
    picks = SampleIndices(np.arange(count), np.zeros(count, np.int64), np.zeros(count, np.int64))
    images = captions = 0.0
    computing = computing_in(resolve_precision(precision, device).precision, device)
    with torch.inference_mode(), packed_weights(), computing:  # as features are computed
        for _ in range(3):  # the first passes fill caches, and pack weights at their second use
            began = time.perf_counter()
            read = sides.image(picks, index.__getitem__)
            if read.kept:
                pool_inputs(model.image, read.inputs)
            images = time.perf_counter() - began
            pool_inputs(model.text, sides.text(picks, index.__getitem__).inputs)
            captions = time.perf_counter() - began - images
    return (images * distinct_images + captions * len(index.texts)) / count


def time_closed_form(image: int, text: int, pairs: int) -> float:
    """Estimated seconds of the moments of ``pairs`` with so many features a side, and of one trial of heads in closed
    form, from the time of one product as those of the moments are. A trial factors either side and solves for the
    products of both; reading, standardising and copying take as long as half of the products (``dev/LOG.md``)."""
    wide = max(image, text)
    dtype = torch.float32 if wide > WIDE else torch.float64
    rows = torch.ones(_PRODUCT_ROWS, wide, dtype=dtype, device=PartialState().device)
    took = float("inf")
    for _ in range(2):  # the first product takes half as long again
        began = time.perf_counter()
        float((rows.T @ rows)[0, 0])  # waits for a device that computes asynchronously
        took = min(took, time.perf_counter() - began)
    rate = _PRODUCT_ROWS * wide**2 / took
    moments = pairs * (image**2 + image * text + text**2)
    trial = (image**3 + text**3) / 6 + 2 * image * text * wide
    return 1.5 * (moments + trial) / rate


class _FirstBatches:
    """The first batches of an epoch, each timed from its request to the next: reading and step. Raises
    ``SlowStepError`` where too few of them would fit into ``left`` seconds."""

    def __init__(self, batches: BatchStream, left: float):
        self._batches, self._left, self._fewest = batches, left, min(FEWEST_STEPS, len(batches))
        self._cycles: list[float] = []

    def __len__(self) -> int:
        return min(TIMED_STEPS, len(self._batches))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        began = time.perf_counter()
        for batch in islice(self._batches.epoch(number, start=start), len(self)):
            yield batch
            ended = time.perf_counter()
            self._cycles.append(ended - began)
            fill = _OF_FIRST if len(self._cycles) == 1 else 1
            if self._cycles[-1] * self._fewest > fill * self._left:
                raise SlowStepError(self._cycles[-1], self._fewest)
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
