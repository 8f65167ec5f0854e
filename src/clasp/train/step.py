"""One training step: embed a batch, measure the loss, move the selected weights.

In: a model, a loss, settings, a batch and the number of the step. Out: ``Stepped``, numbers for the log; weights moved.
Unusual: randomness is drawn from (seed, step) alone, so a step does not care what ran before it. ``gradients`` is the
one place that changes when a batch is worked through in pieces. A loss or gradient that is not finite stops the run
before it reaches the weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from clasp.train import optim
from clasp.train.plan import TrainSettings
from clasp.train.precision import Precision
from clasp.train.state import TrainState
from clasp.types import Batch, Embeddings, Loss, Tokens, UserError


@runtime_checkable
class Trainable(Protocol):
    """A module that embeds a batch and names what trains in it.

    ``train()`` must leave frozen things alone: running statistics of a norm are in no selection, so no run would save
    them. ``after_step`` puts back into bounds what a step may have pushed out (the log scale).
    """

    @property
    def selection(self) -> frozenset[str]: ...

    def __call__(self, batch: Batch) -> Embeddings: ...

    def after_step(self) -> None: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def train(self, mode: bool = True) -> Any: ...

    def to(self, device: torch.device) -> Any: ...


class Measured(NamedTuple):
    """The loss of a batch, whose gradient is now on the weights, and the scale of its logits."""

    loss: Tensor
    scale: Tensor


class Stepped(NamedTuple):
    """What a step was like; ``gradient_norm`` is that before clipping."""

    loss: float
    lr: float
    scale: float
    gradient_norm: float


class Stepper:
    """Holds what moves the weights; ``weights`` is the selection, by name."""

    def __init__(
        self,
        model: Trainable,
        loss: Loss,
        settings: TrainSettings,
        accelerator: Accelerator,
        precision: Precision,
        *,
        steps: int,
        towers: Sequence[str],
    ):
        assert towers or settings.lr_tower == 1.0, "lr_tower needs the names of the towers"
        self.model, self.loss, self.settings, self.steps = model, loss, settings, steps
        self.accelerator, self.precision = accelerator, precision
        self.warmup = round(settings.warmup_fraction * steps)
        self.longest = math.inf if settings.clip_norm == "none" else settings.clip_norm
        model.to(accelerator.device)
        self.weights = optim.selected(dict(model.named_parameters()), model.selection)
        groups = optim.groups(
            self.weights, weight_decay=settings.weight_decay, lr_factors=dict.fromkeys(towers, settings.lr_tower)
        )
        self.optimizer = optim.adamw(
            groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, device=accelerator.device
        )

    def step(self, batch: Batch, number: int) -> Stepped:
        """Takes step ``number`` (from 0). Raises UserError, with the weights as they were, if it would spoil them."""
        lr = self.settings.lr * optim.warmup_cosine(number, self.steps, self.warmup, self.settings.lr_floor)
        optim.set_lr(self.optimizer, lr)
        seed_generators(step_seed(self.settings.seed, number), self.accelerator.device)
        measured = self.gradients(on_device(batch, self.accelerator.device))
        norm = self.accelerator.clip_grad_norm_(list(self.weights.values()), self.longest)
        assert norm is not None
        # the one moment of a step in which a GPU is waited for
        loss, scale, gradient_norm = torch.stack([measured.loss, measured.scale, norm.float()]).tolist()
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            self.optimizer.zero_grad()
            raise UserError(self.advice(loss, number, lr))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step()
        return Stepped(loss, lr, scale, gradient_norm)

    def gradients(self, batch: Batch) -> Measured:
        """Leaves the gradient of the batch's loss on the weights; the loss is taken in float32 at any precision."""
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            out = self.model(batch)
        bias = None if out.bias is None else out.bias.float()
        parts = self.loss(out.image.float(), out.text.float(), out.scale.float(), bias, groups=batch.groups)
        self.accelerator.backward(parts.total)
        return Measured(parts.total.detach(), out.scale.detach().float())

    def selection(self, *, copied: bool = False) -> dict[str, Tensor]:
        """The trained weights by name: the live tensors, or a copy on the CPU."""
        live = {name: parameter.detach() for name, parameter in self.weights.items()}
        return {name: tensor.to("cpu", copy=True) for name, tensor in live.items()} if copied else live

    def memory(self) -> dict[str, Tensor]:
        """What the optimizer remembers, by name; not copied."""
        return optim.state(self.optimizer, self.weights)

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Copies weights into the model; they must be of the same names and shapes, else UserError."""
        ours = {name: tuple(parameter.shape) for name, parameter in self.weights.items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if different := sorted(dict(ours.items() ^ theirs.items())):
            raise UserError(
                f"the saved state is of a run that trains something else: {different[0]!r} is "
                f"{theirs.get(different[0], 'missing')} there and {ours.get(different[0], 'not trained')} here"
            )
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(weights[name])

    def restore(self, start: TrainState) -> None:
        """Puts weights and optimizer back as they were."""
        self.put(start.weights)
        optim.restore(self.optimizer, self.weights, start.optimizer)

    def advice(self, loss: float, number: int, lr: float) -> str:
        """What to say when step ``number`` must not be taken."""
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        tries = [f"train.lr={self.settings.lr / 3:.1g}", "a longer train.warmup_fraction"]
        if self.precision == "bfloat16":
            tries.append("train.precision=float32")
        return (
            f"{what} at step {number + 1} of {self.steps} (lr {lr:.2g}); the step was not taken and nothing was "
            f"overwritten; try {' or '.join(tries)}"
        )


def step_seed(seed: int, step: int) -> int:
    """A seed for one step's dropout and noise, unlike that of its neighbours."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest(), "big")


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the generators that a step draws from: ``torch.manual_seed`` asks every kind of device, at 1 ms a call."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device; tensors that are there already are not copied."""
    return replace(
        batch,
        image=_moved(batch.image, device),
        text=_moved(batch.text, device),
        groups=batch.groups.to(device, non_blocking=True),
    )


def _moved(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tokens):
        return Tokens(inputs.ids.to(device, non_blocking=True), inputs.mask.to(device, non_blocking=True))
    return replace(inputs, values=inputs.values.to(device, non_blocking=True))
