"""The dual encoder: two towers, two heads, the scale and the bias of the logits.

In goes a ``Batch`` (pixels and tokens, or what frozen towers already said of them), out come unit vectors in one space.
It knows nothing of where its towers come from, and two towers may share modules without it noticing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor, nn

from clasp.nn.anatomy import is_norm
from clasp.nn.towers import Tower, tensor_hashes
from clasp.nn.tuning import freeze
from clasp.types import Batch, Embeddings, ImageInput, Pixels, Pooled, TextInput, Tokens, UserError

Kind = Literal["scale", "head", "norm", "new", "tower"]


class HeadSettings(BaseModel):
    """``[head]`` of a recipe: from a tower's pooled vector to the joint space, the same for both towers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["linear", "mlp", "glu", "none"] = "linear"
    """``mlp``: a hidden layer beside the linear map; ``glu``: a gated layer (SAIL); ``none`` joins equal widths"""
    width: int = Field(default=512, ge=1)
    """E, the width of the joint space"""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the hidden layer of mlp and glu; twice ``width`` where left out"""
    standardize: bool = False
    """Shift and scale each feature, starting from the training pairs' mean and deviation (Glow's ActNorm)"""
    start: Literal["random", "cca"] = "random"
    """``cca``: linear heads start where canonical correlation has them in closed form; needs ``standardize`` and frozen
    towers"""
    ridge: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Ridges of that closed form, image and text, in units of a feature's variance"""
    noise: float = Field(default=0.0, ge=0)
    """Deviation of the Gaussian noise added to the features while training"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the features dropped while training"""


class LogitSettings(BaseModel):
    """The part of ``[loss]`` that says what makes logits of cosines. The defaults are CLIP's (section 2.5)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Literal["log", "divisor"] = "log"
    """What is learned. ``log``: the logarithm of the scale, put back into range after each step. ``divisor``: LilT's
    temperature, which divides; it is clamped in place before each use, and its gradient is that at the clamped value"""
    scale_start: float = Field(default=1 / 0.07, gt=0, allow_inf_nan=False)
    """The scale before the first step"""
    scale_range: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 100.0)
    """Least and greatest scale; 0 and inf leave that side open"""

    @model_validator(mode="after")
    def _in_range(self) -> LogitSettings:
        least, greatest = self.scale_range
        if not least < greatest:
            raise UserError(f"scale_range = [{least:g}, {greatest:g}] is not a least and a greatest scale")
        if not least <= self.scale_start <= greatest:
            raise UserError(f"scale_start = {self.scale_start:g} is outside scale_range = [{least:g}, {greatest:g}]")
        if self.scale == "divisor" and greatest == math.inf:
            raise UserError("scale = 'divisor' needs a greatest scale in scale_range: nothing is divided by 0")
        return self


class Standardize(nn.Module):
    """``x * scale + shift`` per feature, starting from data (``start_from``; Kingma & Dhariwal, 2018, section 3.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def start_from(self, features: Float[Tensor, "n D"]) -> None:
        """Make ``features`` come out with mean 0 and deviation 1. Constant features stay small."""
        deviation, mean = torch.std_mean(features.double(), dim=0, correction=0)
        scale = 1 / deviation.clamp(min=1e-3 * float(deviation.median()) + 1e-12)
        with torch.no_grad():
            self.scale.copy_(scale)
            self.shift.copy_(-mean * scale)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return x * self.scale + self.shift


class Noise(nn.Module):
    """Gaussian noise while training, nothing otherwise."""

    def __init__(self, deviation: float):
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return x + self.deviation * torch.randn_like(x) if self.training and self.deviation else x


class LinearWithMLP(nn.Module):
    """``linear(x) + out(gelu(inner(x)))``; starts as the linear map alone."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.linear, self.inner, self.out = nn.Linear(width, out), nn.Linear(width, hidden), nn.Linear(hidden, out)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        return self.linear(x) + self.out(F.gelu(self.inner(x)))


class GatedLinear(nn.Module):
    """``out(silu(gate(x)) * up(x))``: the gated head of SAIL (Zhang et al., CVPR 2025), with SiLU for its ReLU6."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.gate, self.up, self.out = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        return self.out(F.silu(self.gate(x)) * self.up(x))


class Head(nn.Module):
    """A pooled vector to the joint space, before normalisation."""

    def __init__(self, width: int, settings: HeadSettings):
        super().__init__()
        out, hidden = settings.width, settings.hidden or 2 * settings.width
        if settings.kind == "none" and width != out:
            raise UserError(
                f"head.kind = 'none' joins pooled vectors as they are: width {width} is not head.width = {out}"
            )
        self.standardize = Standardize(width) if settings.standardize else None
        self.noise, self.dropout = Noise(settings.noise), nn.Dropout(settings.dropout)
        self.map: nn.Module = {
            "linear": lambda: nn.Linear(width, out),
            "mlp": lambda: LinearWithMLP(width, hidden, out),
            "glu": lambda: GatedLinear(width, hidden, out),
            "none": nn.Identity,
        }[settings.kind]()

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        if self.standardize is not None:
            x = self.standardize(x)
        return self.map(self.dropout(self.noise(x)))


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters of one part."""

    total: int
    trained: int
    delta_bytes: int

    @property
    def percent(self) -> float:
        """Trained share of the same part, in per cent."""
        return 100 * self.trained / self.total if self.total else 0.0


class DualEncoder(nn.Module):
    """Two towers aligned in one space; an ``Encoder``.

    ``selection`` names the parameters that train: it alone decides what gets gradients, what the optimizer holds, what
    the delta saves and what is counted.
    """

    log_scale: nn.Parameter | None
    temperature: nn.Parameter | None

    def __init__(
        self,
        image: Tower,
        text: Tower,
        head: HeadSettings,
        *,
        loss: str,
        seed: int,
        logits: LogitSettings | None = None,
    ):
        super().__init__()
        self.name = f"{image.name} + {text.name}"
        self.image, self.text = image, text
        device = next(image.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image_head = Head(image.width, head).to(device)
            self.text_head = Head(text.width, head).to(device)
        logits = logits or LogitSettings()
        start, *limits = (_stored(logits.scale, scale) for scale in (logits.scale_start, *logits.scale_range))
        scale = nn.Parameter(torch.tensor(start, device=device))
        self.log_scale, self.temperature = (scale, None) if logits.scale == "log" else (None, scale)
        self._limits = sorted(limits)  # of that parameter; a temperature falls as its scale rises
        # SigLIP (Zhai et al., ICCV 2023) needs a bias against the many negatives; InfoNCE cannot see one
        self.bias = nn.Parameter(torch.tensor(-10.0, device=device)) if loss == "sigmoid" else None
        self.selection: frozenset[str] = frozenset()
        self.select(())

    def select(self, names: Iterable[str]) -> None:
        """Make ``names`` the selection and freeze everything else."""
        self.selection = frozenset(names)
        freeze(self, self.selection)

    @property
    def new_names(self) -> dict[str, set[str]]:
        """Parameters that no base has, by part: the heads (with a learned pooling) and the scale (with its bias)."""
        heads = ("image_head.", "text_head.", "image.pooling.", "text.pooling.")
        names = [name for name, _ in self.named_parameters()]
        return {
            "heads": {name for name in names if name.startswith(heads)},
            "scale": {name for name in names if name in ("log_scale", "temperature", "bias")},
        }

    @property
    def kinds(self) -> dict[str, Kind]:
        """What each parameter of the selection is, by name: the keys of ``train.lr_factors``.

        ``scale`` and ``head`` as in ``new_names``. Inside a tower, ``new`` is what its base does not have (bottlenecks,
        appended blocks with their norms, low-rank factors, prompts); of the base, ``norm`` or the rest, ``tower``.
        """
        kinds: dict[str, Kind] = dict.fromkeys(self.new_names["heads"], "head")
        kinds.update(dict.fromkeys(self.new_names["scale"], "scale"))
        for side, tower in (("image", self.image), ("text", self.text)):
            assert tower.hashes, "what is new is told from the weights of the base, and shapes have none"
            norms = {id(p) for module in tower.net.modules() if is_norm(module) for p in module.parameters()}
            for name, p in tower.net.named_parameters():
                based = name.replace(".base_layer.", ".") in tower.hashes  # peft renames the weights that it wraps
                kinds[f"{side}.net.{name}"] = ("norm" if id(p) in norms else "tower") if based else "new"
        return {name: kinds[name] for name, _ in self.named_parameters() if name in self.selection}

    def counts(self) -> dict[str, Count]:
        """Parameters in all and trained: for the whole (``model``), per tower, for the heads and for the scale."""
        new = self.new_names

        def part_of(name: str) -> str:
            return next((part for part, names in new.items() if name in names), name.partition(".")[0])

        def count(part: str | None) -> Count:
            chosen = [(n, p) for n, p in self.named_parameters() if part is None or part_of(n) == part]
            trained = [p for n, p in chosen if n in self.selection]
            total = sum(p.numel() for _, p in chosen)
            return Count(total, sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained))

        return {"model": count(None), **{part: count(part) for part in ("image", "text", "heads", "scale")}}

    def delta(self) -> dict[str, Tensor]:
        """The trained tensors, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if name in self.selection}

    @property
    def fingerprint(self) -> str:
        """Of everything an embedding depends on: both bases, the delta, and what is new though it does not train."""
        ours = self.selection.union(*self.new_names.values())
        tensors = {name: p.detach() for name, p in self.named_parameters() if name in ours}
        hashes = sorted(tensor_hashes(tensors).items())
        return hashlib.sha256(repr((self.image.fingerprint, self.text.fingerprint, hashes)).encode()).hexdigest()

    # --- encoding ------------------------------------------------------------------------------------------------

    def embed_image(self, inputs: ImageInput) -> Float[Tensor, "B E"]:
        """Images (or what the frozen image tower said of them) to unit vectors."""
        pooled = inputs.values if isinstance(inputs, Pooled) else self.image.pooled(inputs)
        return F.normalize(self.image_head(pooled).float(), dim=-1)

    def embed_text(self, inputs: TextInput) -> Float[Tensor, "B E"]:
        """Captions (or what the frozen text tower said of them) to unit vectors."""
        pooled = inputs.values if isinstance(inputs, Pooled) else self.text.pooled(inputs)
        return F.normalize(self.text_head(pooled).float(), dim=-1)

    def encode_image(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E"]:
        """Normalised pixels to unit vectors."""
        return self.embed_image(Pixels(pixels))

    def encode_text(self, tokens: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B E"]:
        """Token ids to unit vectors; ``mask`` is true on real tokens."""
        return self.embed_text(Tokens(tokens, mask))

    def scale_and_bias(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]:
        """What makes logits of cosines: the scale (not its logarithm) and, for the sigmoid loss, the bias."""
        if self.temperature is not None:
            with torch.no_grad():  # in place, so that the gradient is taken there and is not cut off
                self.temperature.clamp_(*self._limits)
            return self.temperature.reciprocal(), self.bias
        assert self.log_scale is not None
        return self.log_scale.exp(), self.bias

    def forward(self, batch: Batch) -> Embeddings:
        """A batch to its embeddings, with the scale and bias of their logits."""
        return Embeddings(self.embed_image(batch.image), self.embed_text(batch.text), *self.scale_and_bias())

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the log scale back into its range; a temperature is, before it is used again."""
        if self.log_scale is not None:
            self.log_scale.clamp_(*self._limits)


def _stored(form: Literal["log", "divisor"], scale: float) -> float:
    """A scale as the parameter that is learned; 0 and inf stand for no limit."""
    if form == "log":
        return math.log(scale) if scale else -math.inf
    return 1 / scale if scale else math.inf
