"""Bottleneck adapters: small modules at every residual branch of a tower's blocks.

Input: a net, its ``ModelStructure`` and some of its blocks. Output: the names of the new parameters. Note: adapters
are children of their block and are applied by forward hooks, so that no base parameter is renamed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.autocast import is_autocast
from clasp.models.frozen_products import biased_product
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
    """Insert an adapter at every residual branch of ``blocks``, at the branch's ``input`` or its ``output``.

    LilT (section 3) inserts them at the input, before the norm, in its image tower, and at the output, before the
    residual sum, in its text tower. The bottleneck is ``width // reduction`` wide. Returns the names of the new
    parameters. Raises ``UserError`` where the net has no known place of this kind, for a block that has adapters, and
    for a reduction above every width.
    """
    names, widest = set[str](), 0
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
            widest = max(widest, width)
            with torch.device(next(module.parameters(), next(owner.parameters())).device):
                adapter = Adapter(width, max(1, width // reduction), init, _is_channels_first(module, structure, place))
            name = f"adapter{number}"
            if name in dict(owner.named_children()):
                raise UserError(f"adapters: {block.path} is given adapters twice; let the block ranges not overlap")
            owner.add_module(name, adapter)
            _register_adapter_hook(module, adapter, place)
            names |= {f"{block.path}.{name}.{p}" for p, _ in adapter.named_parameters()}
    if reduction > widest > 0:
        raise UserError(
            f"adapters(reduction={reduction}): the branches of {structure.family} are at most {widest} wide, so there "
            f"is nothing to reduce; at most {widest}"
        )
    return names


# --- how -------------------------------------------------------------------------------------------------------------


def _register_adapter_hook(module: nn.Module, adapter: Adapter, place: str) -> None:
    if place == "input":
        module.register_forward_pre_hook(_AdaptBranchInput(adapter), with_kwargs=True)
    else:
        module.register_forward_hook(_AdaptBranchOutput(adapter))


class _AdaptBranchInput:
    """A hook as an object, so that a deep copy of a tower copies the adapters of its hooks."""

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


def is_adapter_hook(hook: Any) -> bool:
    """Whether a hook is an adapter, which keeps nothing of a pass."""
    return isinstance(hook, _AdaptBranchInput | _AdaptBranchOutput)


def hooks_of(net: nn.Module) -> list[Any]:
    """The forward hooks of a net and of all its modules."""
    hooked = (each for module in net.modules() for each in (module._forward_pre_hooks, module._forward_hooks))
    return [hook for hooks in hooked for hook in hooks.values()]


def _is_channels_first(module: nn.Module, structure: ModelStructure, place: str) -> bool:
    """Whether the module's input (or output) is ``[B D height width]``: its first (or last) layer is a convolution."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    edge = layers[:1] if place == "input" else layers[-1:]
    return structure.channels_first or any(isinstance(layer, nn.Conv2d) for layer in edge)


def _branch_width(net: nn.Module, path: str, module: nn.Module, place: str, states: int | None) -> int:
    """Width of the module's input (or output), read from its weights, or from those of the nearest enclosing module.

    ``states`` is the width of the block's hidden states, where it is known.
    """
    while True:
        width = _width_in(module) if place == "input" else _width_out(module, states)
        if width:
            return width
        path = path.rpartition(".")[0]  # an Identity or a Dropout has no weights; use its parent
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
    """Width of a norm that is a direct child of the block, hence of its hidden states."""
    return next((next(m.parameters()).numel() for m in block.children() if is_norm(m)), None)


def _width_out(module: nn.Module, states: int | None) -> int | None:
    """Output width of the layer as wide as the hidden states, else of the last layer, else of the last vector.

    A norm inside may have the width of one attention head (Gemma 3), and the last layer may be declared first (Phi 3).
    """
    layer_widths, vectors = [], []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            layer_widths.append(part.out_features)
        elif isinstance(part, nn.Conv1d | nn.Conv2d):
            layer_widths.append(part.out_channels)
        elif next(part.children(), None) is None:
            vectors += [p.numel() for p in part.parameters() if p.ndim == 1]  # a norm or a layer scale
    return states if states in layer_widths else next(reversed(layer_widths or vectors), None)


class Adapter(nn.Module):
    """Bottleneck adapter: ``x + up(gelu(down(x)))`` (Houlsby et al., ICML 2019; LilT section 3).

    ``init="identity"`` zeroes ``up``, so that inserting adapters does not change a tower's output; ``init="random"`` is
    LilT's N(0, 0.02) with zero biases. Applied to the last axis, or to axis 1 of feature maps (``channels_first``).
    """

    def __init__(self, width: int, hidden: int, init: str, channels_first: bool):
        super().__init__()
        self.channels_first = channels_first
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        if self.up.weight.is_meta:  # only counted; initialising on meta would take most of the time of counting
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
        x = self._adapted_in_products(x) if self._joins_products(x) else x + self.up(F.gelu(self.down(x)))
        return x.movedim(-1, 1) if self.channels_first else x

    def _joins_products(self, x: Tensor) -> bool:
        """Whether the adapter of this input is one function: under autocast, where nothing wraps or watches its
        layers."""
        layers = (self.down, self.up)
        plain = all(type(each) is nn.Linear and not (each._forward_hooks or each._forward_pre_hooks) for each in layers)
        return plain and is_autocast(x.device)

    def _adapted_in_products(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        kind = x.device.type
        parameters = (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return _BottleneckProducts.apply(x, *parameters, dtype)  # pyright: ignore[reportReturnType]


class _BottleneckProducts(torch.autograd.Function):
    """``x + up(gelu(down(x)))`` as autocast computes it, bit by bit; its gradients within rounding.

    The input in ``dtype`` and the output of ``down`` are kept: GELU is computed again, and the gradient of the residual
    is added in the product of the other branch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        *parameters, dtype = given
        rows = x.to(dtype).flatten(0, -2)
        down, down_bias, up, up_bias = (each.to(dtype) for each in parameters)
        inside = biased_product(rows, down, down_bias)
        update = biased_product(F.gelu(inside), up, up_bias)
        update = torch.ops.aten._unsafe_view(update, x.shape)  # no view: nets add to it
        ctx.dtypes = [each.dtype for each in parameters]
        ctx.save_for_backward(rows, inside, down, up)
        return update.add_(x) if x.dtype == dtype else x + update

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, inside, down, up = ctx.saved_tensors
        whole = gradients[0].flatten(0, -2)
        gradient = whole.to(rows.dtype)
        of_inside = torch.ops.aten.gelu_backward(gradient @ up, inside)
        of_x = None
        if ctx.needs_input_grad[0]:
            alike = whole.dtype == rows.dtype
            of_x = torch.addmm(whole, of_inside, down) if alike else whole + of_inside @ down
            of_x = of_x.view_as(gradients[0])
        if not any(ctx.needs_input_grad[1:5]):
            return of_x, *(None,) * 5
        found = (of_inside.t() @ rows, of_inside.sum(0), gradient.t() @ F.gelu(inside), gradient.sum(0))
        return of_x, *(each.to(dtype) for each, dtype in zip(found, ctx.dtypes, strict=True)), None
