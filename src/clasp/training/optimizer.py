"""AdamW: parameter groups, weight-decay filters, learning-rate schedules, and the optimizer state by name.

Input: the trainable parameters of a model by name. Output: AdamW over exactly these; the learning-rate factor of a
step. ``DECAY_FILTERS`` and ``SCHEDULES`` are the choices of ``train.decay_filter`` and ``train.schedule``, beside
``package.module:Name``. Note: groups depend on names and shapes only, so they work for any tower; the state is saved
and loaded as tensors named after their parameters, never as a pickle or by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from clasp.data.plugins import load_named
from clasp.types import UserError

# Where PyTorch's fused AdamW is a compiled kernel (the CPU since 2.4).
_FUSED_DEVICES = ("cpu", "cuda")
# LilT's warm-up: stairs, optimizer steps on each, and the factor of the first.
_LILT_WARMUP_STAIRS, _LILT_STEPS_PER_STAIR, _LILT_FIRST_FACTOR = 10, 100, 0.1


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share weight decay and a factor on the learning rate."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float
    lr_factor: float


def select_parameters(named: Mapping[str, nn.Parameter], selection: frozenset[str]) -> dict[str, nn.Parameter]:
    """The selected parameters, in the order of ``named``; exactly these must require gradients."""
    assert selection, "the selection is empty: nothing would train"
    assert selection <= named.keys(), f"selected, but not in the model: {sorted(selection - named.keys())[:5]}"
    requiring_grad = {name for name, parameter in named.items() if parameter.requires_grad}
    assert requiring_grad == selection, f"selection and gradients disagree on {sorted(requiring_grad ^ selection)[:5]}"
    return {name: parameter for name, parameter in named.items() if name in selection}


def decays_matrices(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to norms, biases, scales and other vectors.

    A vector with additional axes of length one (ConvNeXt's ``[1, 1, 1, C]``, a class token ``[1, 1, D]``) is a vector;
    a matrix with one row (low-rank with rank 1) is a matrix. ``bias`` must be the whole last part of the name:
    ``relative_position_bias_table`` is not a bias.
    """
    parts = name.split(".")
    vector = len(shape) < 2 or (len(shape) > 2 and sum(length > 1 for length in shape) < 2)
    return not (vector or parts[-1] == "bias" or any("norm" in part.lower() for part in parts[-2:]))


def decays_as_lilt(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay applies in LilT (Khan & Fu, ICLR 2023): to all but one-dimensional tensors and ``….bias``.

    So the logit scale, which has no axis, decays; so do a class token and position embeddings of any number of rows.
    """
    return len(shape) != 1 and not name.endswith(".bias")


def decays_as_msclip(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay applies in MS-CLIP (You et al., ECCV 2022): to matrices and kernels, except embeddings.

    Embeddings are recognised by the names of clasp's nets: ``token_embed.weight`` and ``pos_embed``.
    """
    return decays_matrices(name, shape) and not {"token_embed", "pos_embed"} & set(name.split("."))


DecayFilter = Callable[[str, Sequence[int]], bool]
"""From name and shape of a parameter to whether weight decay applies to it"""
DECAY_FILTERS: dict[str, DecayFilter] = {
    "matrices": decays_matrices,
    "lilt": decays_as_lilt,
    "msclip": decays_as_msclip,
}


def find_decay_filter(name: str) -> DecayFilter:
    """The row of ``DECAY_FILTERS``, or the function that ``package.module:Name`` names. Raises ``UserError``."""
    return load_named(name, DECAY_FILTERS, "train.decay_filter")


def build_parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    *,
    weight_decay: float,
    decay_filter: str = "matrices",
    weight_decay_overrides: Mapping[str, float] = {},
    lr_factors: Mapping[str, float] = {},
) -> list[ParameterGroup]:
    """Parameters by (decay, learning-rate factor), in a stable order.

    ``decay_filter`` is resolved by ``find_decay_filter``. ``weight_decay_overrides``: weight decay by name where it is
    not ``weight_decay``; ``lr_factors``: factor on the learning rate by name, 1 by default.
    """
    decays = find_decay_filter(decay_filter)
    gathered: dict[tuple[float, float], list[str]] = {}
    for name, parameter in parameters.items():
        decay = weight_decay_overrides.get(name, weight_decay) if decays(name, parameter.shape) else 0.0
        gathered.setdefault((decay, lr_factors.get(name, 1.0)), []).append(name)
    return [
        ParameterGroup(tuple(names), tuple(parameters[name] for name in names), decay, factor)
        for (decay, factor), names in gathered.items()
    ]


def build_adamw(
    groups: Sequence[ParameterGroup], *, lr: float, betas: tuple[float, float], eps: float, device: torch.device
) -> AdamW:
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
    return AdamW(options, lr=lr, betas=betas, eps=eps, fused=device.type in _FUSED_DEVICES)


def set_lr(optimizer: AdamW, lr: float) -> None:
    """Set each group's learning rate to ``lr`` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


@dataclass(frozen=True, slots=True)
class ScheduleContext:
    """The arguments of a schedule: total steps and epochs of a run, warm-up steps, lowest factor."""

    steps: int
    epochs: int
    warmup_steps: int
    min_lr_ratio: float


def warmup_cosine(step: int, context: ScheduleContext) -> float:
    """Factor on the learning rate for step ``step`` (from 0).

    Linear warm-up to 1, starting above 0; then half a cosine towards ``min_lr_ratio``, reached one step after the last,
    so that the last step still has a learning rate above it.
    """
    if step < context.warmup_steps:
        return (step + 1) / context.warmup_steps
    return _cosine(
        min(1.0, (step - context.warmup_steps) / max(1, context.steps - context.warmup_steps)), context.min_lr_ratio
    )


def lilt_schedule(step: int, context: ScheduleContext) -> float:
    """LilT's factor on the learning rate for step ``step`` (from 0): stairs in epoch 0, then one value an epoch.

    Stair s is 0.1 + 0.09 s; the next one begins after step 100 (s + 1), so the first is 101 steps long, as in the
    released code, which updates the rate after a step. An epoch 0 of up to 1,001 steps ends below 1. Epoch e from 1
    on has floor + (1 - floor) / 2 * (1 + cos(pi e / epochs)), whatever factor epoch 0 ended at. Its warm-up is fixed:
    ``context.warmup_steps`` is ignored.
    """
    epoch = step // (context.steps // context.epochs)
    if epoch == 0:
        stair = min(_LILT_WARMUP_STAIRS, max(0, step - 1) // _LILT_STEPS_PER_STAIR)
        return _LILT_FIRST_FACTOR + (1.0 - _LILT_FIRST_FACTOR) * stair / _LILT_WARMUP_STAIRS
    return _cosine(epoch / context.epochs, context.min_lr_ratio)


def _cosine(progress: float, min_lr_ratio: float) -> float:
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True, slots=True)
class LrSchedule:
    """A row of ``SCHEDULES``: step (from 0) to a factor on the learning rate.

    ``reads_warmup=False``: the schedule defines its own warm-up, and ``train.warmup_fraction`` cannot be set.
    """

    factor: Callable[[int, ScheduleContext], float]
    reads_warmup: bool = True

    def __call__(self, step: int, context: ScheduleContext) -> float:
        return self.factor(step, context)


SCHEDULES: dict[str, LrSchedule] = {
    "cosine": LrSchedule(warmup_cosine),
    "lilt": LrSchedule(lilt_schedule, reads_warmup=False),
}


def find_schedule(name: str) -> LrSchedule:
    """The row of ``SCHEDULES``, or the function or ``LrSchedule`` that ``package.module:Name`` names.

    Raises ``UserError`` for an unknown one.
    """
    found = load_named(name, SCHEDULES, "train.schedule")
    return found if isinstance(found, LrSchedule) else LrSchedule(found)


def optimizer_state(optimizer: AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer state as ``NAME/exp_avg``, ``NAME/exp_avg_sq``, ``NAME/step``; not copied."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizer: AdamW, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Load the output of ``optimizer_state``, copied to the parameters' devices.

    Raises ``UserError`` for a name that is not trained here.
    """
    loaded: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        loaded.setdefault(name, {})[slot] = tensor
    if unexpected := sorted(loaded.keys() - parameters.keys()):
        raise UserError(f"the saved optimizer state has {unexpected[0]!r}, which this recipe does not train")
    for name, slots in loaded.items():
        loaded[name] = {slot: _copy_with_strides_of(parameters[name], tensor) for slot, tensor in slots.items()}
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {number: loaded[name] for number, name in enumerate(order) if name in loaded}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _copy_with_strides_of(parameter: Tensor, loaded: Tensor) -> Tensor:
    """A copy with the parameter's strides: the fused kernel iterates over both in storage order."""
    if loaded.shape != parameter.shape:  # the step count
        return loaded.detach().clone()
    return torch.empty_like(parameter, dtype=loaded.dtype, requires_grad=False).copy_(loaded)
