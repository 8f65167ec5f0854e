"""The settings of training, and what they come to for a given number of pairs.

In: ``TrainSettings`` as the recipe has them, and the number of training pairs. Out: ``TrainPlan``, with batch and
epochs as numbers and the reason as a sentence. Note: "auto" looks at the number of pairs only. Whoever knows that a
step must fit into memory (towers that train, a small machine) says so with ``largest``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from clasp.data.plugins import list_choices
from clasp.training.attention_kernel import AttentionKernel
from clasp.training.optimizer import SCHEDULES, find_decay_filter, find_schedule
from clasp.training.precision import Precision
from clasp.types import UserError

_Auto = Literal["auto"]

MAX_AUTO_BATCH_SIZE = 1024
# Heads on frozen towers have settled after 180 to 400 steps on 3,300 images (batch 1,024); fewer cost quality.
_MIN_AUTO_STEPS = 300
# LilT trains 15 epochs on 0.6 M pairs; beyond 100,000 pairs epochs shrink with the square root of the data,
# so that the pairs seen still grow with it.
_DEFAULT_EPOCHS = 15
_LARGE_DATA_SET_PAIRS = 100_000


class LrFactors(BaseModel):
    """``[train.lr_factors]``: factors on the learning rate, by kind of parameter.

    Discriminative fine-tuning (Howard & Ruder, ACL 2018, section 3.2), by what a parameter is in place of its depth.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    head: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Heads, with a learned pooling."""
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Scale and bias of the logits."""
    norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Norms of the base."""
    new: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What was put into a tower: adapters, low-rank updates, appended blocks."""
    tower: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """All else of the base that trains."""
    shared: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What both towers hold in common, norms too; where they do, ``tower`` and ``norm`` are what they do not."""


class TrainSettings(BaseModel):
    """How to train. ``plan_training`` replaces "auto" in ``batch`` and ``epochs``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    batch_size: Annotated[int, Field(gt=1)] | _Auto = "auto"
    """Pairs in a step; the negatives of a pair are the others of its batch."""
    micro_batch: Annotated[int, Field(gt=0)] | _Auto = "auto"
    """Pairs whose activations are in memory at a time: a larger batch is worked through in pieces, with the gradient
    of one piece. "auto": the whole batch, or as many as fit, measured when training begins."""
    activation_checkpointing: Literal["none", "blocks"] = "none"
    """What the backward pass computes again, to keep less in memory: the insides of the blocks from the first that
    trains."""
    epochs: Annotated[int, Field(gt=0)] | _Auto = "auto"
    """Times that every pair is seen."""
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Highest learning rate, reached at the end of the warm-up."""
    lr_factors: LrFactors = LrFactors()
    """Factors on ``lr``, by kind of parameter."""
    schedule: str = "cosine"
    """How the learning rate moves, a key of ``SCHEDULES`` or ``package.module:Name``: "cosine" falls
    step by step after the warm-up; "lilt" climbs ten stairs in the first 1,000 steps, holds to the end of the first
    epoch, then falls along the cosine once an epoch."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The learning rate that the cosine falls towards, as a fraction of ``lr``."""
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    """Part of all steps in which the learning rate rises; a schedule may have its own, as "lilt" does."""
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """AdamW's decay, per step and unit of learning rate."""
    weight_decay_shared: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """The decay of what both towers hold in common; as ``weight_decay`` where left out."""
    decay_filter: str = "matrices"
    """What decays, a key of ``DECAY_FILTERS`` or ``package.module:Name``: "matrices" and kernels only; "lilt": all but
    one-dimensional tensors and biases, so the scale and the tables of positions and classes too; "msclip": matrices and
    kernels, but no table of tokens or positions."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """AdamW's memory of the gradient and of its square, as fractions kept at each step."""
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """Added to AdamW's denominator."""
    clip_norm: Annotated[float, Field(gt=0)] | Literal["none"] = 1.0
    """Longest gradient, as the norm over the selection; a longer one is shortened to it."""
    precision: Precision | _Auto = "auto"
    """Numbers to compute in; weights stay float32. "auto" asks the machine."""
    attention: AttentionKernel | _Auto = "auto"
    """The kernel that attends: PyTorch's fused one, or plain products. "auto" measures where the two differ."""
    seed: int = Field(default=0, ge=0)
    """Of the order of pairs, captions drawn, augmentation, dropout and noise."""
    evaluate_every: Annotated[int, Field(gt=0)] | _Auto = "auto"
    """Epochs between evaluations; the last epoch always ends with one. "auto": about ten in a run."""
    select: Literal["best", "last"] = "best"
    """The weights to end with: those of the best evaluation, or of the last step."""
    log_every: int = Field(default=10, gt=0)
    """Steps between log lines."""
    save_every_minutes: float = Field(default=10.0, gt=0)
    """Minutes between savings of the state to go on from."""
    workers: int = Field(default=0, ge=0)
    """Processes that read and decode; with 0 the main one does."""
    trackers: list[str] = []
    """Where the numbers of the run go beside its folder: tensorboard, wandb, mlflow, trackio, or package.module:Name.
    A run may go on with others."""

    @field_validator("schedule")
    @classmethod
    def _require_known_schedule(cls, name: str) -> str:
        find_schedule(name)
        return name

    @field_validator("decay_filter")
    @classmethod
    def _require_known_decay_filter(cls, name: str) -> str:
        find_decay_filter(name)
        return name

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainSettings:
        own = TrainSettings.model_fields["warmup_fraction"].default
        if self.warmup_fraction != own and not find_schedule(self.schedule).reads_warmup:
            others = {name: row for name, row in SCHEDULES.items() if row.reads_warmup}
            raise ValueError(
                f"schedule = {self.schedule!r} has its own warm-up; leave warmup_fraction = {self.warmup_fraction:g} "
                f"out, or set schedule = {list_choices(others)}"
            )
        return self


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a run will do: pairs in a step, epochs, steps in all, and why."""

    batch_size: int
    epochs: int
    steps: int
    reason: str

    def resolved(self, settings: TrainSettings) -> TrainSettings:
        """The settings with nothing left to choose about batch and epochs."""
        return settings.model_copy(update={"batch_size": self.batch_size, "epochs": self.epochs})


def plan_training(settings: TrainSettings, pairs: int, *, max_batch_size: int = MAX_AUTO_BATCH_SIZE) -> TrainPlan:
    """Batch and epochs for so many training pairs; what the recipe sets is kept.

    "auto" batch: the largest power of two that is at most a quarter of the pairs and at most ``max_batch_size``, so
    that an epoch has several steps and batches differ. "auto" epochs: 15, fewer past 100,000 pairs, more where that
    would be fewer than 300 steps. A last batch that is not full is left out of every epoch.
    Raises UserError for fewer than two pairs, or a set batch of more than there are.
    """
    if pairs < 2:
        raise UserError(f"training needs at least two pairs to tell apart, and there {'is 1' if pairs else 'are 0'}")
    reasons = []
    if settings.batch_size == "auto":
        room = max(2, min(pairs // 4, max_batch_size))
        batch = 1 << (room.bit_length() - 1)
        limit = f"at most {max_batch_size:,}" if room == max_batch_size else "at most a quarter of the pairs"
        reasons.append(f"batch {batch:,} is the largest power of two that is {limit}")
    elif settings.batch_size > pairs:
        raise UserError(
            f"train.batch_size = {settings.batch_size} is more than the {pairs} pairs to train on; at most {pairs}"
        )
    else:
        batch = settings.batch_size
        reasons.append(f"batch {batch:,} is set")
    steps_an_epoch = pairs // batch
    if settings.epochs == "auto":
        usual = max(2, round(_DEFAULT_EPOCHS * min(1.0, (_LARGE_DATA_SET_PAIRS / pairs) ** 0.5)))
        enough = -(-_MIN_AUTO_STEPS // steps_an_epoch)
        epochs = max(usual, enough)
        why = f"give at least {_MIN_AUTO_STEPS} steps" if enough > usual else "are usual for so many pairs"
        reasons.append(f"{epochs:,} epochs {why}")
    else:
        epochs = settings.epochs
        reasons.append(f"{epochs:,} epochs are set" if epochs > 1 else "1 epoch is set")
    steps = epochs * steps_an_epoch
    return TrainPlan(batch, epochs, steps, f"{pairs:,} pairs: {' and '.join(reasons)}, {steps:,} steps in all")
