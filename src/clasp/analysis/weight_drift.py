"""How far the weights of a tower are from those of its base, part by part.

In go a tuned tower and its base, out comes a ``PartDrift`` for what lies below the blocks, for each block and for what
follows them. New parts have no base to be measured by, so they are told apart by their share of a part's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from clasp.analysis.similarity import relative_change
from clasp.analysis.weight_interpolation import base_parameter_name
from clasp.models.structure import find_structure
from clasp.models.tower import Tower

INPUT_PART, OUTPUT_PART, ALL_PARTS = "input", "output", "all"


@dataclass(frozen=True, slots=True)
class PartDrift:
    """A part of a tower. ``block`` is its number from 1, 0 for what lies below the blocks or after them."""

    title: str
    block: int
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    new: list[Tensor] = field(default_factory=list)

    @property
    def change(self) -> float:
        """Relative norm of the change of the base's weights; NaN where there are none, as in an appended block."""
        return relative_change(self.before, self.after)

    @property
    def new_fraction(self) -> float:
        """Share of the part's parameters that the base has not."""
        new, old = (sum(tensor.numel() for tensor in tensors) for tensors in (self.new, self.after))
        return new / (new + old) if new else 0.0


def measure_drift(tower: Tower, base: Tower) -> list[PartDrift]:
    """The parts of a tower from its input to its output. A learned pooling is new in its output."""
    anatomy_ = find_structure(tower.net)
    blocks = {block.path: PartDrift(f"block {number}", number) for number, block in enumerate(anatomy_.blocks, 1)}
    first, last = PartDrift(INPUT_PART, 0), PartDrift(OUTPUT_PART, 0)
    there = dict(base.net.named_parameters())
    for name, parameter in tower.net.named_parameters():
        inside = next((part for path, part in blocks.items() if name.startswith(f"{path}.")), None)
        after = any(name.startswith(f"{path}.") for path in anatomy_.tail)
        part = inside or (last if after else first)
        own = there.pop(base_parameter_name(name), None)
        if own is None:
            part.new.append(parameter.detach())
        else:
            part.before.append(own.detach())
            part.after.append(parameter.detach())
    assert not there, f"the base has what the tuned tower has not: {sorted(there)[:3]}"
    if tower.pooling is not None:
        last.new.extend(parameter.detach() for parameter in tower.pooling.parameters())
    return [first, *blocks.values(), last]


def merge_drift(parts: list[PartDrift]) -> PartDrift:
    """All parts as one."""
    gathered = PartDrift(ALL_PARTS, 0)
    for part in parts:
        gathered.before.extend(part.before)
        gathered.after.extend(part.after)
        gathered.new.extend(part.new)
    return gathered
