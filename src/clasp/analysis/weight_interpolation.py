"""Linear interpolation between base weights and tuned weights of a tower.

Input: a tuned tower and its base. Output: the obstacles to interpolation, or a ``WeightInterpolation``, which changes
the tower in place. WiSE-FT (Wortsman et al., CVPR 2022, equation 1) interpolates all weights of a fully tuned CLIP;
ours applies the same formula to methods that add parameters, by scaling a factor in which the addition is linear: the
up-projection of an adapter, one factor of a low-rank update (``added_parameters`` in ``TUNING_METHODS``). Note: at 0
the tower's output equals that of its base, at 1 that of the tuned tower, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clasp.errors import counted
from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.models.tuning.spec import weight_path


@dataclass(frozen=True, slots=True)
class _ParameterPath:
    """One parameter with its values at 0 (``start``) and at 1 (``end``)."""

    parameter: nn.Parameter
    start: Tensor
    end: Tensor


class WeightInterpolation:
    """Interpolates from the base (0) to the tuned tower (1). ``interpolation_obstacles`` must be empty."""

    def __init__(self, tower: Tower, base: Tower):
        self._paths = list(_parameter_paths(tower, base))

    @property
    def is_identity(self) -> bool:
        """Whether the tower has no tuned parameter."""
        return not self._paths

    @contextmanager
    def at(self, alpha: float) -> Iterator[None]:
        """Context in which the tower has the weights at ``alpha`` in [0, 1]; the tuned weights are restored after."""
        try:
            self._set_alpha(alpha)
            yield
        finally:
            self._set_alpha(1.0)

    @torch.no_grad()
    def _set_alpha(self, alpha: float) -> None:
        for path in self._paths:
            path.parameter.copy_(torch.lerp(path.start, path.end, alpha))  # exact at both ends


def base_parameter_name(name: str) -> str:
    """The name in the base of a parameter that peft has wrapped."""
    return name.replace(".base_layer.", ".")


def interpolation_obstacles(tower: Tower, base: Tower) -> list[str]:
    """Reasons why ``tower`` cannot be interpolated with ``base``; empty where it can."""
    more = len(find_structure(tower.net).blocks) - len(find_structure(base.net).blocks)
    if more:
        return [counted(more, "appended block")]
    if tower.moving:
        return ["running statistics of BatchNorm"]
    found: dict[str, None] = {}
    for name in _added_parameters(tower, base):
        method, path = weight_path(tower.tunings, name) or (name, "nonlinear")
        if path == "nonlinear":
            found[method] = None
    return list(found)


def _added_parameters(tower: Tower, base: Tower) -> list[str]:
    base_names = {name for name, _ in base.net.named_parameters()}
    return [name for name, _ in tower.net.named_parameters() if base_parameter_name(name) not in base_names]


def _parameter_paths(tower: Tower, base: Tower) -> Iterator[_ParameterPath]:
    base_parameters = dict(base.net.named_parameters())
    for name, parameter in tower.net.named_parameters():
        if not parameter.requires_grad:
            continue
        end = parameter.detach().clone()
        if (start := base_parameters.get(base_parameter_name(name))) is not None:
            yield _ParameterPath(parameter, start.detach().clone(), end)
            continue
        _, path = weight_path(tower.tunings, name) or (name, "constant")
        if path == "from zero":
            yield _ParameterPath(parameter, torch.zeros_like(end), end)
        elif path == "from one":
            yield _ParameterPath(parameter, torch.ones_like(end), end)
