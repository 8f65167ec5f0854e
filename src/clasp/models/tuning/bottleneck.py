"""Bottleneck adapters for a tower: small modules at every residual branch of its blocks.

In go a net, its anatomy and some blocks, out come the names of the parameters that are new. The bottlenecks are
children of their block and act through forward hooks, so no parameter of the base changes its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.structure import BlockStructure, ModelStructure, is_norm
from clasp.types import UserError

ADAPTER_PLACES = ("output", "input")
ADAPTER_INITS = ("identity", "random")


def insert_adapters(
    net: nn.Module,
    structure: ModelStructure,
    blocks: Iterable[BlockStructure],
    *,
    reduction: int,
    place: str,
    init: str,
) -> set[str]:
    """Put a bottleneck at every residual branch of ``blocks``, at the branch's ``input`` or its ``output``.

    LilT (section 3) has them at the input, before the norm, in its image tower and at the output, before the residual
    sum, in its text tower. ``reduction`` divides the branch's width. Returns the names of the new parameters.
    Raises ``UserError`` when no such place is known in the net's family, and for a block that has adapters already.
    """
    names: set[str] = set()
    for block in blocks:
        places = block.branch_inputs if place == "input" else block.branch_outputs
        if not places:
            what = "the module a branch begins with" if place == "input" else "its attention and MLP modules"
            raise UserError(
                f"adapters(place={place!r}): {structure.family} has no known branch {place} in {block.path}; "
                f"looked for {what}"
            )
        owner = net.get_submodule(block.path)
        for number, path in enumerate(places, 1):
            module = net.get_submodule(path)
            width = _branch_width(net, path, module, place, _norm_width(owner))
            with torch.device(next(module.parameters(), next(owner.parameters())).device):
                adapter = Adapter(width, max(1, width // reduction), init, _is_channels_first(module, structure, place))
            name = f"adapter{number}"
            if name in dict(owner.named_children()):
                raise UserError(f"adapters: {block.path} is given adapters twice; let the block ranges not overlap")
            owner.add_module(name, adapter)
            _register_adapter_hook(module, adapter, place)
            names |= {f"{block.path}.{name}.{p}" for p, _ in adapter.named_parameters()}
    return names


# --- how -------------------------------------------------------------------------------------------------------------


def _register_adapter_hook(module: nn.Module, adapter: Adapter, place: str) -> None:
    if place == "input":
        module.register_forward_pre_hook(_AdaptBranchInput(adapter), with_kwargs=True)
    else:
        module.register_forward_hook(_AdaptBranchOutput(adapter))


class _AdaptBranchInput:
    """A hook that is an object, so that copying a tower copies what its hooks point to."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (self.adapter(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.adapter(kwargs["hidden_states"])}


class _AdaptBranchOutput:
    def __init__(self, adapter: Adapter):
        self.adapter = adapter

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.adapter(output[0]), *output[1:])
        return self.adapter(output)


def _is_channels_first(module: nn.Module, structure: ModelStructure, place: str) -> bool:
    """Whether ``B D height width`` flows into (or out of) the module: its first (or last) layer is a convolution."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    edge = layers[:1] if place == "input" else layers[-1:]
    return structure.channels_first or any(isinstance(layer, nn.Conv2d) for layer in edge)


def _branch_width(net: nn.Module, path: str, module: nn.Module, place: str, states: int | None) -> int:
    """Channels that flow into (or out of) the module: read from it, or from the nearest weights around it.

    ``states`` is the width of the block's states, where it is known.
    """
    while True:
        width = _width_in(module) if place == "input" else _width_out(module, states)
        if width:
            return width
        path = path.rpartition(".")[0]  # an Identity or a Dropout: its neighbours know
        module = net.get_submodule(path)


def _width_in(module: nn.Module) -> int | None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part.in_channels
        if isinstance(part, nn.Linear):
            return part.in_features
        if is_norm(part):
            return next(part.parameters()).numel()
    return None


def _norm_width(block: nn.Module) -> int | None:
    """Width of a norm that stands in the block itself, hence of its states."""
    return next((next(m.parameters()).numel() for m in block.children() if is_norm(m)), None)


def _width_out(module: nn.Module, states: int | None) -> int | None:
    """Of the map in it that gives states, else of its last map, else of its last vector.

    A norm beside the maps may be of one head's width (Gemma 3), and the last map need not be written last (Phi 3).
    """
    maps, vectors = [], []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            maps.append(part.out_features)
        elif isinstance(part, nn.Conv1d | nn.Conv2d):
            maps.append(part.out_channels)
        elif next(part.children(), None) is None:
            vectors += [p.numel() for p in part.parameters() if p.ndim == 1]  # a norm or a layer scale
    return states if states in maps else next(reversed(maps or vectors), None)


class Adapter(nn.Module):
    """Bottleneck adapter: ``x + up(gelu(down(x)))`` (Houlsby et al., ICML 2019; LilT section 3).

    ``init="identity"`` zeroes ``up``, so a tower is unchanged when adapters are inserted; ``init="random"`` is the
    paper's N(0, 0.02) with zero biases. Works on the last axis, or on axis 1 of feature maps (``channels_first``).
    """

    def __init__(self, width: int, hidden: int, init: str, channels_first: bool):
        super().__init__()
        self.channels_first = channels_first
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        if self.up.weight.is_meta:  # only counted; drawing shapes would be most of the time that counting takes
            return
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if init == "identity":
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.trunc_normal_(self.up.weight, std=0.02)

    def forward(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        if self.channels_first:
            x = x.movedim(1, -1)
        x = x + self.up(F.gelu(self.down(x)))
        return x.movedim(-1, 1) if self.channels_first else x
