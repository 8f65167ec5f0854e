"""The optimizer: what it holds, how far each step goes, and its state by name.

In: a model with a selection. Out: AdamW over the selection and nothing else; the learning-rate factor of a step.
Unusual: groups are made from names and shapes alone, so a foreign tower needs no help; the state goes out and
comes back as tensors named after their parameters, never as a pickle or by position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from clasp.types import UserError

# Where PyTorch's fused AdamW is a compiled kernel (the CPU since 2.4).
FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share weight decay and a factor on the learning rate."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float
    lr_factor: float


def selected(named: Mapping[str, nn.Parameter], selection: frozenset[str]) -> dict[str, nn.Parameter]:
    """The selection out of a model's ``named_parameters``, in their order; what gets gradients must be just these."""
    assert selection, "the selection is empty: nothing would train"
    assert selection <= named.keys(), f"selected, but not in the model: {sorted(selection - named.keys())[:5]}"
    learning = {name for name, parameter in named.items() if parameter.requires_grad}
    assert learning == selection, f"selection and gradients disagree on {sorted(learning ^ selection)[:5]}"
    return {name: parameter for name, parameter in named.items() if name in selection}


def decays(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to norms, biases, scales and other vectors.

    A vector dressed up with axes of length one (ConvNeXt's ``[1, 1, 1, C]``, a class token ``[1, 1, D]``) is a vector;
    a matrix with one row (low-rank with rank 1) is a matrix. ``bias`` must be the whole last part of the name:
    ``relative_position_bias_table`` is not a bias.
    """
    parts = name.split(".")
    vector = len(shape) < 2 or (len(shape) > 2 and sum(length > 1 for length in shape) < 2)
    return not (vector or parts[-1] == "bias" or any("norm" in part.lower() for part in parts[-2:]))


def groups(
    parameters: Mapping[str, nn.Parameter], *, weight_decay: float, lr_factors: Mapping[str, float] | None = None
) -> list[Group]:
    """Parameters by (decay, learning-rate factor), in a stable order.

    ``lr_factors`` maps the beginning of a name to a factor on the learning rate; the longest that fits decides,
    and where none fits the factor is 1.
    """
    factors = dict(lr_factors or {})
    gathered: dict[tuple[float, float], list[str]] = {}
    for name, parameter in parameters.items():
        prefix = max((prefix for prefix in factors if name.startswith(prefix)), key=len, default=None)
        decay = weight_decay if decays(name, parameter.shape) else 0.0
        gathered.setdefault((decay, 1.0 if prefix is None else factors[prefix]), []).append(name)
    return [
        Group(tuple(names), tuple(parameters[name] for name in names), decay, factor)
        for (decay, factor), names in gathered.items()
    ]


def adamw(groups: Sequence[Group], *, lr: float, betas: tuple[float, float], eps: float, device: torch.device) -> AdamW:
    """AdamW (Loshchilov and Hutter, ICLR 2019) over the groups; fused where PyTorch has a kernel for the device."""
    options = [
        {
            "params": list(group.parameters),
            "weight_decay": group.weight_decay,
            "lr": lr * group.lr_factor,
            "lr_factor": group.lr_factor,
        }
        for group in groups
    ]
    return AdamW(options, lr=lr, betas=betas, eps=eps, fused=device.type in FUSED_DEVICES)


def set_lr(optimizer: AdamW, lr: float) -> None:
    """Gives each group the learning rate times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the learning rate for step ``step`` (from 0) of ``steps``.

    Rises in equal stairs to 1 over ``warmup`` steps, the first step already moving; then half a cosine towards
    ``floor``, which it would reach at ``step == steps``, so that the last step still moves.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def state(optimizer: AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's memory as ``NAME/exp_avg``, ``NAME/exp_avg_sq``, ``NAME/step``; not copied."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore(optimizer: AdamW, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Puts ``state`` back, copied, on the parameters' devices; a name that is not trained here is a UserError."""
    remembered: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        remembered.setdefault(name, {})[slot] = tensor.detach().clone()
    if strange := sorted(remembered.keys() - parameters.keys()):
        raise UserError(f"the saved optimizer state has {strange[0]!r}, which this recipe does not train")
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {number: remembered[name] for number, name in enumerate(order) if name in remembered}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})
