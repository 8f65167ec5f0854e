"""Training settings, and the batch size, epochs and steps they resolve to for a given number of pairs.

Input: ``TrainSettings`` as in the recipe, and the number of training pairs. Output: ``TrainPlan``, with batch size and
epochs as numbers and the reason as a sentence. Note: "auto" depends on the number of pairs only; a caller whose steps
must fit into memory (towers that train, a small machine) passes ``max_batch_size``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from clasp.data.plugins import list_choices
from clasp.errors import counted
from clasp.plain_types import MAX_COUNT, AttentionKernel, Precision, UserError

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

    Discriminative fine-tuning (Howard & Ruder, ACL 2018, section 3.2), by kind of parameter instead of by depth.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    head: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Projection heads and learned pooling."""
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Logit scale and logit bias."""
    norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Norm layers of the backbone."""
    new: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Parameters added to a tower: adapters, low-rank updates, appended blocks."""
    tower: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """All other trainable parameters of the backbone."""
    shared: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Parameters shared by both towers, norms included; ``tower`` and ``norm`` then apply to the others."""


class TrainSettings(BaseModel):
    """How to train. ``plan_training`` replaces "auto" in ``batch_size`` and ``epochs``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    batch_size: Annotated[int, Field(gt=1, le=MAX_COUNT)] | _Auto = "auto"
    """Pairs in a step; the negatives of a pair are the others of its batch."""
    micro_batch: Annotated[int, Field(gt=0, le=MAX_COUNT)] | _Auto = "auto"
    """Pairs whose activations are in memory at a time: a larger batch is split into micro-batches with gradient caching
    (GradCache), to the same gradient. "auto": the whole batch, or as many as fit, measured when training begins."""
    activation_checkpointing: Literal["none", "blocks"] = "none"
    """Activation checkpointing: "blocks" recomputes the activations inside blocks in the backward pass, from the first
    trainable block on."""
    epochs: Annotated[int, Field(ge=0, le=1_000_000)] | _Auto = "auto"
    """Passes over the training pairs; 0: no gradient step, the initial weights (as those of ``head.init = "cca"``) are
    evaluated and saved."""
    max_steps: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """Most gradient steps: training ends after them, within an epoch too, and the schedule ends with it. In
    ``schedule = "lilt"``, an epoch is then an equal share of the steps."""
    init_from: str | None = None
    """A run folder whose trained tensors the trainable parameters start from, by name; others keep their own
    initialisation."""
    init_parts: Literal["all", "towers"] = "all"
    """What of ``init_from`` is copied. "all": the heads are then not initialised from the pairs. "towers": heads and
    logit scale start as without ``init_from``, from the features of the tuned towers; layers, pooling and width of the
    heads may differ from those of the run."""
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate, reached at the end of the warm-up."""
    lr_factors: LrFactors = LrFactors()
    """Factors on ``lr``, by kind of parameter."""
    schedule: str = "cosine"
    """Learning-rate schedule, a key of ``SCHEDULES`` or ``package.module:Name``: "cosine" decays
    every step after the warm-up; "lilt" rises in ten stairs over the first 1,000 steps, is constant to the end of the
    first epoch, then decays along the cosine once an epoch."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate of the cosine decay, as a fraction of ``lr``."""
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    """Fraction of all steps spent on warm-up; a schedule may define its own warm-up, as "lilt" does."""
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """AdamW's decoupled weight decay."""
    weight_decay_shared: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Weight decay of the parameters shared by both towers; ``weight_decay`` where left out."""
    decay_filter: str = "matrices"
    """Parameters that weight decay applies to, a key of ``DECAY_FILTERS`` or ``package.module:Name``:
    "matrices": matrices and kernels only; "lilt": all but one-dimensional tensors and biases, so also the logit scale,
    position embeddings and class tokens; "msclip": matrices and kernels, except token and position embeddings."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """AdamW's exponential decay rates of the first and second moment of the gradient."""
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """Added to AdamW's denominator."""
    clip_norm: Annotated[float, Field(gt=0)] | Literal["none"] = 1.0
    """Gradient clipping: maximum global norm over the trainable parameters, or "none"."""
    precision: Precision | _Auto = "auto"
    """Compute precision of the training step, and of features, embeddings and evaluation by towers that are not
    convolutional; weights stay float32. "auto": bfloat16 where it is measured to be faster."""
    attention: AttentionKernel | _Auto = "auto"
    """Attention kernel: PyTorch's fused one, or plain matrix products. "auto" measures where the two differ.
    Encoding in bfloat16 on a CPU takes plain products in packaged towers, whatever is set."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    """Random seed of pair order, caption sampling, augmentation, dropout and noise."""
    evaluate_every: Annotated[int, Field(gt=0, le=MAX_COUNT)] | Literal["auto", "end"] = "auto"
    """Epochs between evaluations, the first one before any step; the last epoch always ends with one. "auto": about ten
    in a run. "end": that one alone."""
    select: Literal["best", "last"] = "best"
    """Final weights: those of the best evaluation, or of the last step."""
    log_every: int = Field(default=10, gt=0, le=MAX_COUNT)
    """Steps between log lines."""
    save_every_minutes: float = Field(default=10.0, gt=0)
    """Minutes between saves of the training state that a run resumes from."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Data-loading worker processes; 0: the main process."""
    trackers: list[str] = []
    """Experiment trackers beside the run folder: tensorboard, wandb, mlflow, trackio, or package.module:Name.
    A run may be resumed with others."""

    @property
    def starts_heads(self) -> bool:
        """Whether the heads are initialised from the pairs, not copied from a run."""
        return self.init_from is None or self.init_parts == "towers"

    @field_validator("schedule")
    @classmethod
    def _require_known_schedule(cls, name: str) -> str:
        from clasp.training.optimizer import find_schedule  # here, since it imports torch

        find_schedule(name)
        return name

    @field_validator("decay_filter")
    @classmethod
    def _require_known_decay_filter(cls, name: str) -> str:
        from clasp.training.optimizer import find_decay_filter

        find_decay_filter(name)
        return name

    @model_validator(mode="after")
    def _parts_of_a_run(self) -> TrainSettings:
        if self.init_parts != "all" and self.init_from is None:
            raise ValueError(f"init_parts = {self.init_parts!r} is of the run that init_from names; set init_from too")
        return self

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainSettings:
        if self.warmup_fraction == TrainSettings.model_fields["warmup_fraction"].default:
            return self
        from clasp.training.optimizer import SCHEDULES, find_schedule

        if not find_schedule(self.schedule).reads_warmup:
            others = {name: row for name, row in SCHEDULES.items() if row.reads_warmup}
            raise ValueError(
                f"schedule = {self.schedule!r} has its own warm-up; leave warmup_fraction = {self.warmup_fraction:g} "
                f"out, or set schedule = {list_choices(others)}"
            )
        return self


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """Batch size, epochs and total steps of a run, and the reason for them."""

    batch_size: int
    epochs: int
    steps: int
    reason: str

    def resolved(self, settings: TrainSettings) -> TrainSettings:
        """The settings with batch size and epochs as numbers."""
        return settings.model_copy(update={"batch_size": self.batch_size, "epochs": self.epochs})


TOO_FEW_PAIRS = "training needs at least two pairs to tell apart"


def plan_training(settings: TrainSettings, pairs: int, *, max_batch_size: int = MAX_AUTO_BATCH_SIZE) -> TrainPlan:
    """Batch size and epochs for ``pairs`` training pairs; values set in the recipe are used as they are.

    "auto" batch: the largest power of two that is at most a quarter of the pairs and at most ``max_batch_size``, so
    that an epoch has several steps and batches differ. "auto" epochs: 15, fewer past 100,000 pairs, more where that
    would be fewer than 300 steps. The last incomplete batch of an epoch is dropped. ``max_steps`` may end training
    within the last epoch.
    Raises UserError for fewer than two pairs, or a set batch of more than there are.
    """
    if pairs < 2:
        raise UserError(f"{TOO_FEW_PAIRS}, and there {'is 1' if pairs else 'are 0'}")
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
    steps_per_epoch = pairs // batch
    if settings.epochs == "auto":
        usual = max(2, round(_DEFAULT_EPOCHS * min(1.0, (_LARGE_DATA_SET_PAIRS / pairs) ** 0.5)))
        enough = -(-_MIN_AUTO_STEPS // steps_per_epoch)
        epochs = max(usual, enough)
        why = f"give at least {_MIN_AUTO_STEPS} steps" if enough > usual else "are usual for so many pairs"
        reasons.append(f"{epochs:,} epochs {why}")
    else:
        epochs = settings.epochs
        reasons.append(f"{counted(epochs, 'epoch')} {'is' if epochs == 1 else 'are'} set")
    steps = epochs * steps_per_epoch
    if not steps:
        reason = "no gradient step (train.epochs = 0), the weights stay as they are initialised"
        return TrainPlan(batch, epochs, steps, f"{counted(pairs, 'pair')}: {reason}")
    if settings.max_steps is not None and settings.max_steps < steps:
        steps = settings.max_steps
        epochs = -(-steps // steps_per_epoch)
        reasons.append(f"at most {counted(steps, 'step')}")
    return TrainPlan(
        batch, epochs, steps, f"{counted(pairs, 'pair')}: {' and '.join(reasons)}, {counted(steps, 'step')} in all"
    )
