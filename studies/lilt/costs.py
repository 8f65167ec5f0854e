"""The cost of a row: FLOPs and memory, counted on any machine; speed and peak memory, timed on an idle machine.

Input: a model with its recipe and pairs, or a finished run. Output: numbers for a record. Note: FLOPs are those of the
first epoch, with an empty feature cache: the features of frozen parts are computed once per pair, and count towards the
cost of the pair.
"""

from __future__ import annotations

from typing import Any

from clasp.commands.train import TrainResult
from clasp.config.build import ModelAndPreprocessing, build_feature_source
from clasp.config.recipe import Recipe
from clasp.data.loader import PairLoader
from clasp.data.pairs import Pairs
from clasp.data.readers import PairIndex
from clasp.training.cost.flops import count_flops as counted_flops
from clasp.training.losses.contrastive import info_nce
from clasp.training.memory import ActivationMemory

ADAM = 3  # values per trainable parameter: its gradient, and AdamW's two moments


def counted(parts: ModelAndPreprocessing, recipe: Recipe, pairs: Pairs) -> dict[str, Any]:
    """One step on all of ``pairs``. ``flops`` and ``kept_bytes`` (saved activations) are per pair, the latter from a
    whole batch; ``fixed_bytes`` are the weights, and gradients and optimizer state of the trainable ones."""
    model, recipe = parts.model, recipe.with_overrides(["data.feature_cache=off"])
    inputs, listing = build_feature_source(parts, recipe), PairIndex(pairs)
    sides = inputs.batch_reader(pairs, listing, None)
    batch = next(PairLoader(sides, batch_size=len(pairs), seed=0).epoch(0))

    def step() -> None:
        seen = model(batch)
        info_nce(seen.image, seen.text, seen.scale, groups=batch.groups).total.backward()
        model.zero_grad()

    flops = counted_flops(step)
    with ActivationMemory(model.parameters()) as kept:
        seen = model(batch)
    del seen
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return {
        "flops": (flops.forward + flops.backward) / len(pairs),
        "flops_forward": flops.forward / len(pairs),
        "kept_bytes": kept.bytes / len(pairs),
        "fixed_bytes": sum(size * (1 + ADAM * trains) for size, trains in sizes),
    }


def timed(done: TrainResult) -> dict[str, Any]:
    """From the cost ledger of a run: pairs per second of the median step, peak memory beyond the initial usage."""
    session = done.cost.sessions[-1]
    return {
        "pairs_per_second": session.pairs_per_second,
        "peak_bytes": session.peak_bytes,
        "stages": {stage: round(seconds, 2) for stage, seconds in session.seconds.items()},
    }
