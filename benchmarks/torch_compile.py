"""The speed-up of ``torch.compile`` on a training step, block by block: the reason why clasp does not compile.

Forward and backward of DINOv2 ViT-S/14 at 98 px, eager and with every block compiled for its shape, in alternation. The
compile time before the first step is reported. A machine without a C++ compiler cannot run it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks import harness
from benchmarks.harness import Contestant, Row, sized
from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings
from clasp.models.tuning.spec import freeze_except
from clasp.models.zoo.registry import load_backbone
from clasp.types import Pixels

BATCH = sized(32, 2)
TUNED = {
    "low-rank r=8": ["lora(rank=8)"],
    "adapters + norms": ["adapters(reduction=4)", "norms"],
    "every weight": ["full"],
}


def rows() -> Sequence[Row]:
    return [compare(name, methods) for name, methods in TUNED.items()]


def compare(name: str, methods: list[str]) -> Row:
    eager, compiled = (_tower(methods) for _ in range(2))
    for block in find_structure(compiled.net).blocks:
        compiled.net.get_submodule(block.path).compile(dynamic=False)
    pixels = Pixels(torch.randn(BATCH, 3, 98, 98, generator=torch.Generator().manual_seed(0)))
    began = time.perf_counter()
    _step(compiled, pixels)
    took = time.perf_counter() - began
    contestants = [Contestant("eager", lambda: _step(eager, pixels)), Contestant("c", lambda: _step(compiled, pixels))]
    rates = harness.race(contestants)
    note = f"batch {BATCH}; the first compiled step took {took:.1f} s"
    title = f"a step of the image tower, {name}"
    return Row(title, "images/s", rates["eager"], "the same, compiled", rates["c"], None, "higher", note)


def _tower(methods: list[str]) -> Tower:
    tower = Tower(load_backbone(ImageTowerSettings(tower="pip:dinov2-small-focus")))
    freeze_except(tower, tower.tune(methods, seed=0))
    return tower


def _step(tower: Tower, pixels: Pixels) -> int:
    tower.pooled(pixels).square().mean().backward()
    for p in tower.parameters():
        p.grad = None
    return BATCH


if __name__ == "__main__":
    harness.main(rows)
