"""The straight way between a base and what was made of it: every tuned weight of a tower, part of the way along.

In go a tuned tower and its base, out come the reasons why there is no such way, or a ``WeightInterpolation`` that moves
the tower in place. WiSE-FT (Wortsman et al., CVPR 2022, equation 1) interpolates all weights of a fully tuned CLIP;
ours walks the same line for methods that add to the base: an adapter's up-projection and one factor of a low-rank
product are scaled, in which what the method adds is linear; the row of a method in ``TUNING_METHODS`` has which. Note:
at 0 the tower answers as its base and at 1 as it
was, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.models.tuning.spec import weight_path


@dataclass(frozen=True, slots=True)
class _ParameterPath:
    """One parameter, and where it goes from and to."""

    parameter: nn.Parameter
    start: Tensor
    end: Tensor


class WeightInterpolation:
    """From the base (0) to the tuned tower (1). ``interpolation_obstacles`` must have found nothing."""

    def __init__(self, tower: Tower, base: Tower):
        self._paths = list(_parameter_paths(tower, base))

    @property
    def is_identity(self) -> bool:
        """Whether nothing in the tower was tuned."""
        return not self._paths

    @contextmanager
    def at(self, alpha: float) -> Iterator[None]:
        """The tower of which this is the way stands at ``alpha`` inside, and is as it was after."""
        try:
            self._set_alpha(alpha)
            yield
        finally:
            self._set_alpha(1.0)

    @torch.no_grad()
    def _set_alpha(self, alpha: float) -> None:
        for move in self._paths:
            move.parameter.copy_(torch.lerp(move.start, move.end, alpha))  # exact at both ends


def base_parameter_name(name: str) -> str:
    """What the base calls a parameter that peft has wrapped."""
    return name.replace(".base_layer.", ".")


def interpolation_obstacles(tower: Tower, base: Tower) -> list[str]:
    """Why there is no straight way from ``base`` to ``tower``; empty where there is one."""
    more = len(find_structure(tower.net).blocks) - len(find_structure(base.net).blocks)
    if more:
        return [f"{more} appended block{'s' if more > 1 else ''}"]
    if tower.moving:
        return ["running statistics of BatchNorm"]
    found: dict[str, None] = {}
    for name in _added_parameters(tower, base):
        method, path = weight_path(tower.tunings, name) or (name, "nonlinear")
        if path == "nonlinear":
            found[method] = None
    return list(found)


def _added_parameters(tower: Tower, base: Tower) -> list[str]:
    there = {name for name, _ in base.net.named_parameters()}
    return [name for name, _ in tower.net.named_parameters() if base_parameter_name(name) not in there]


def _parameter_paths(tower: Tower, base: Tower) -> Iterator[_ParameterPath]:
    there = dict(base.net.named_parameters())
    for name, parameter in tower.net.named_parameters():
        if not parameter.requires_grad:
            continue
        end = parameter.detach().clone()
        if (own := there.get(base_parameter_name(name))) is not None:
            yield _ParameterPath(parameter, own.detach().clone(), end)
            continue
        _, path = weight_path(tower.tunings, name) or (name, "constant")
        if path == "from zero":
            yield _ParameterPath(parameter, torch.zeros_like(end), end)
        elif path == "from one":
            yield _ParameterPath(parameter, torch.ones_like(end), end)
