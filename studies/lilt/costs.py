"""What a row costs: its arithmetic and memory, counted anywhere; its speed and peak, timed on an idle machine.

In: a model with its recipe and pairs, or a run that has ended. Out: numbers for a record. Unusual: arithmetic is that
of a first epoch, in which nothing is kept yet: what the frozen part of a tower says is computed once for every pair,
and belongs to what the pair costs.
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

ADAM = 3  # numbers beside each weight that trains: its gradient, and the optimizer's two


def counted(parts: ModelAndPreprocessing, recipe: Recipe, pairs: Pairs) -> dict[str, Any]:
    """One step on all of ``pairs``. ``flops`` and ``kept_bytes`` (for the backward pass) are of a pair, the latter from
    a whole batch; ``fixed_bytes`` are the weights, and for those that train gradient and optimizer."""
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
    """What the ledger of a run says: pairs a second of its median step, its peak beyond what was there before."""
    session = done.cost.sessions[-1]
    return {
        "pairs_per_second": session.pairs_per_second,
        "peak_bytes": session.peak_bytes,
        "stages": {stage: round(seconds, 2) for stage, seconds in session.seconds.items()},
    }
