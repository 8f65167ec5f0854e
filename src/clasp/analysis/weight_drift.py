"""Weight drift: how far the weights of a tuned tower are from those of its base, part by part.

Input: a tuned tower and its base. Output: a ``PartDrift`` for the input embedding, for each block and for what follows
the blocks. New modules have no base weights to compare with; they are reported as a fraction of a part's parameters.
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
    """A part of a tower. ``block`` is the block number from 1; 0 for what precedes or follows the blocks."""

    title: str
    block: int
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    new: list[Tensor] = field(default_factory=list)

    @property
    def change(self) -> float:
        """Relative norm of the change of the base weights; NaN without base weights, as in an appended block."""
        return relative_change(self.before, self.after)

    @property
    def new_fraction(self) -> float:
        """Fraction of the part's parameters that the base does not have."""
        new, old = (sum(tensor.numel() for tensor in tensors) for tensors in (self.new, self.after))
        return new / (new + old) if new else 0.0


def measure_drift(tower: Tower, base: Tower) -> list[PartDrift]:
    """The parts of a tower from input to output. A learned pooling counts as new parameters of the output part."""
    structure = find_structure(tower.net)
    blocks = {block.path: PartDrift(f"block {number}", number) for number, block in enumerate(structure.blocks, 1)}
    first, last = PartDrift(INPUT_PART, 0), PartDrift(OUTPUT_PART, 0)
    base_parameters = dict(base.net.named_parameters())
    for name, parameter in tower.net.named_parameters():
        inside = next((part for path, part in blocks.items() if name.startswith(f"{path}.")), None)
        after = any(name.startswith(f"{path}.") for path in structure.tail)
        part = inside or (last if after else first)
        base_parameter = base_parameters.pop(base_parameter_name(name), None)
        if base_parameter is None:
            part.new.append(parameter.detach())
        else:
            part.before.append(base_parameter.detach())
            part.after.append(parameter.detach())
    assert not base_parameters, f"not in the tuned tower: {sorted(base_parameters)[:3]}"
    if tower.pooling is not None:
        last.new.extend(parameter.detach() for parameter in tower.pooling.parameters())
    return [first, *blocks.values(), last]


def merge_drift(parts: list[PartDrift]) -> PartDrift:
    """All parts merged into one."""
    merged = PartDrift(ALL_PARTS, 0)
    for part in parts:
        merged.before.extend(part.before)
        merged.after.extend(part.after)
        merged.new.extend(part.new)
    return merged
