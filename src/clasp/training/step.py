"""One training step: embed a batch, compute the loss and its gradient, update the trainable parameters.

Input: a model, a loss, settings, a batch and the step number. Output: ``StepResult`` for the log; weights updated in
place. Note: random numbers depend on (seed, step, process) only, so a step does not depend on what ran before it. A
batch of more than ``micro_batch`` pairs uses gradient caching (``training.grad_cache``), to the same gradient. A loss
or gradient that is not finite stops the run before the weights are updated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clasp.data.device import to_device
from clasp.models.frozen_casts import FrozenCasts
from clasp.plain_types import Precision
from clasp.training import grad_cache
from clasp.training import optimizer as optim
from clasp.training.batch_parts import WholeBatchLoss
from clasp.training.distributed import Processes
from clasp.training.grad_cache import Embedder, LossAndScale, MicroBatchChoice, at_least_float32
from clasp.training.memory import is_out_of_memory
from clasp.training.settings import TrainSettings
from clasp.training.state import TrainState
from clasp.types import Batch, Embeddings, Loss, LossParts, PooledFeatures, UserError


@runtime_checkable
class Trainable(Embedder, Protocol):
    """A module that embeds a batch, or either side of it, and names its trainable parameters (``selection``).

    ``train()`` must leave frozen modules in eval mode: running statistics of norms are in no selection and are
    saved only if they are in ``moving``. ``after_step`` clamps parameters to their bounds, such as the log of the logit
    scale.
    """

    @property
    def selection(self) -> frozenset[str]: ...

    @property
    def moving(self) -> Mapping[str, Tensor]: ...

    def __call__(self, batch: Batch) -> Embeddings: ...

    def after_step(self) -> None: ...

    def train(self, mode: bool = True) -> Any: ...

    def to(self, device: torch.device) -> Any: ...


class StepResult(NamedTuple):
    """Metrics of a step; ``gradient_norm`` is before clipping, ``scale`` is the logit scale."""

    loss: float
    lr: float
    scale: float
    gradient_norm: float


class Stepper:
    """Optimizer, learning-rate schedule and gradient computation of a model; ``weights``: trainable parameters by name.

    With several ``processes``, each is given its part of a batch, and all take the same step.

    ``kinds`` maps each of them to its kind, for ``lr_factors`` and the weight decay of shared parameters; where it is
    empty all have the same learning rate.
    ``micro_batch`` is ``None`` until it is set by the recipe, restored with the state of a run, or chosen; it is halved
    when memory runs out.
    """

    def __init__(
        self,
        model: Trainable,
        loss: Loss,
        settings: TrainSettings,
        processes: Processes,
        precision: Precision,
        *,
        steps: int,
        kinds: Mapping[str, str],
    ):
        self.model, self.settings, self.steps = model, settings, steps
        self.loss = loss if processes.size == 1 else WholeBatchLoss(loss, processes)
        self.processes, self.device = processes, processes.device
        self.precision: Precision = precision
        self.micro_batch = None if settings.micro_batch == "auto" else settings.micro_batch
        assert settings.epochs != "auto", "resolve the settings with plan_training first"
        warmup = round(settings.warmup_fraction * steps)
        self.schedule = optim.find_schedule(settings.schedule)
        self.schedule_context = optim.ScheduleContext(steps, settings.epochs, warmup, settings.min_lr_ratio)
        self.max_norm = math.inf if settings.clip_norm == "none" else settings.clip_norm
        model.to(self.device)
        self.weights = optim.select_parameters(dict(model.named_parameters()), model.selection)
        self.frozen_casts = nullcontext
        if precision == "bfloat16":
            assert isinstance(model, nn.Module)
            self.frozen_casts = FrozenCasts(model)
        self.optimizer = optim.build_adamw(
            self._parameter_groups(kinds),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            device=self.device,
        )
        if model.moving and self.micro_batch is None:
            assert settings.batch_size != "auto", "resolve the settings with plan_training first"
            self.micro_batch = (
                settings.batch_size
            )  # BatchNorm statistics are of whole batches, and measuring would update them

    def _parameter_groups(self, kinds: Mapping[str, str]) -> list[optim.ParameterGroup]:
        """The trainable parameters grouped by weight decay and learning rate."""
        factors, shared_decay = self.settings.lr_factors.model_dump(), self.settings.weight_decay_shared
        assert kinds or (set(factors.values()) == {1.0} and shared_decay is None), (
            "these need the kinds of the parameters"
        )
        assert not kinds or kinds.keys() >= self.weights.keys(), "a parameter that trains is of no kind"
        shared = [name for name, kind in kinds.items() if kind == "shared"]
        return optim.build_parameter_groups(
            self.weights,
            weight_decay=self.settings.weight_decay,
            decay_filter=self.settings.decay_filter,
            weight_decay_overrides={} if shared_decay is None else dict.fromkeys(shared, shared_decay),
            lr_factors={name: factors[kind] for name, kind in kinds.items()},
        )

    def restore(self, state: TrainState) -> None:
        """Restore the weights, the optimizer state and the micro-batch size of a saved state.

        Raises ``UserError`` for the state of a run with other trainable parameters.
        """
        if state.micro_batch is not None:  # a set one too: it is halved where memory ran out
            self.micro_batch = state.micro_batch
        self.load_weights(state.weights)
        optim.load_optimizer_state(self.optimizer, self.weights, state.optimizer)

    def step(
        self, batch: Batch, number: int, *, around_gradient: AbstractContextManager[Any] | None = None
    ) -> StepResult:
        """Take step ``number`` (from 0), its gradient computed inside of ``around_gradient``.

        Raises ``UserError``, weights unchanged, if loss or gradient is not finite.
        """
        lr = self.settings.lr * self.schedule(number, self.schedule_context)
        optim.set_lr(self.optimizer, lr)
        with around_gradient or nullcontext():
            measured = self.backward(batch, number)
        weights = list(self.weights.values())
        self.processes.sum_gradients(weights)
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        # the only synchronisation with the GPU in a step
        loss, scale, gradient_norm = torch.stack([measured.loss, measured.scale, norm.float()]).tolist()
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            self.optimizer.zero_grad()
            with self.processes.alike():
                raise UserError(self.divergence_message(loss, number, lr))
        if gradient_norm > 0.99 * self.max_norm - 1e-5:  # below, the factor is 1: a pass over the gradients less
            torch.nn.utils.clip_grads_with_norm_(weights, self.max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step()
        return StepResult(loss, lr, scale, gradient_norm)

    def backward(self, batch: Batch, number: int) -> LossAndScale:
        """Compute the gradient of the batch's loss; the loss itself is computed in float32 at any precision.

        Out of memory, the micro-batch is halved, for all further steps, and the gradient computed again. Not with
        several processes, where the others wait in the middle of the step, nor where BatchNorm sees whole batches.
        """
        while True:
            try:
                with self.frozen_casts() if runs_a_tower(batch) else nullcontext():
                    return self._backward(batch, number)
            except (RuntimeError, MemoryError) as error:
                pairs = min(self.micro_batch or len(batch.ids), len(batch.ids))
                if not is_out_of_memory(error) or pairs == 1 or self.processes.size > 1 or self.model.moving:
                    raise
            # outside of the handler, whose error holds the tensors of the failed attempt
            self.micro_batch = pairs // 2
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _backward(self, batch: Batch, number: int) -> LossAndScale:
        if self.micro_batch is not None and len(batch.ids) > self.micro_batch:
            embedder = self._micro_batch_embedder(number)
            return grad_cache.backward_in_micro_batches(embedder, batch, self.loss, self.micro_batch)
        device = self.device
        seed_generators(step_seed(self.settings.seed, number, *self.processes.seed_key), device)
        image, text = to_device(batch.image, device), to_device(batch.text, device)
        batch = replace(batch, image=image, text=text, groups=batch.groups.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            out = self.model(batch)
        bias = None if out.bias is None else at_least_float32(out.bias)
        parts = self.loss(
            at_least_float32(out.image),
            at_least_float32(out.text),
            at_least_float32(out.scale),
            bias,
            groups=batch.groups,
        )
        if not isinstance(parts, LossParts):
            raise UserError(f"loss.kind: the loss returned a {type(parts).__name__}; a LossParts is expected")
        parts.total.backward()
        return LossAndScale(parts.total.detach(), out.scale.detach().float())

    def choose_micro_batch(self, batch: Batch) -> MicroBatchChoice:
        """Measure how many pairs fit in memory at a time; sets ``micro_batch`` for all further steps.

        The least of all processes, each of which embeds its own micro-batches.
        """
        whole = 0 if self.settings.batch_size == "auto" else self.settings.batch_size
        pairs = max(len(batch.ids), -(-whole // self.processes.size))
        with self.frozen_casts() if runs_a_tower(batch) else nullcontext():
            choice = grad_cache.choose_micro_batch(
                self._micro_batch_embedder(0), batch, pairs, sharing_memory=self.processes.sharing_memory
            )
        self.micro_batch = min(found for (found,) in self.processes.gather_numbers(choice.micro_batch))
        return choice._replace(micro_batch=self.micro_batch)

    def _micro_batch_embedder(self, number: int) -> grad_cache.MicroBatchEmbedder:
        def seed(side: str, piece: int) -> None:
            seed_generators(step_seed(self.settings.seed, number, side, piece, *self.processes.seed_key), self.device)

        return grad_cache.MicroBatchEmbedder(self.model, self.device, self.precision, seed)

    def selected_weights(self, *, copied: bool = False) -> dict[str, Tensor]:
        """The trained weights and updated running statistics by name: the live tensors, or a copy on the CPU."""
        live = {name: parameter.detach() for name, parameter in self.weights.items()} | dict(self.model.moving)
        return {name: tensor.to("cpu", copy=True) for name, tensor in live.items()} if copied else live

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer state by name; not copied."""
        return optim.optimizer_state(self.optimizer, self.weights)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the model. Raises ``UserError`` unless names and shapes are the same."""
        live = self.selected_weights()
        ours = {name: tuple(tensor.shape) for name, tensor in live.items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if different := sorted(dict(ours.items() ^ theirs.items())):
            raise UserError(
                f"the saved state is of a run that trains something else: {different[0]!r} is "
                f"{theirs.get(different[0], 'missing')} there and {ours.get(different[0], 'not trained')} here"
            )
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(weights[name])

    def divergence_message(self, loss: float, number: int, lr: float) -> str:
        """The error message when loss or gradient of step ``number`` is not finite."""
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        tries = [f"train.lr={self.settings.lr / 3:.1g}"]
        if self.schedule.reads_warmup:
            tries.append("a longer train.warmup_fraction")
        if self.precision == "bfloat16":
            tries.append("train.precision=float32")
        return (
            f"{what} at step {number + 1} of {self.steps} (lr {lr:.2g}); the step was not taken and nothing was "
            f"overwritten; try {' or '.join(tries)}"
        )


def runs_a_tower(batch: Batch) -> bool:
    """Whether a batch is not wholly of cached features, of which a step computes the heads alone."""
    return not all(isinstance(inputs, PooledFeatures) for inputs in (batch.image, batch.text))


def step_seed(seed: int, step: int, *piece: str | int) -> int:
    """A seed for dropout and noise of one step, or of a micro-batch of it, by hashing."""
    key = " ".join(map(str, (seed, step, *piece)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that a step uses; ``torch.manual_seed`` seeds every kind of device, at 1 ms a call."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
