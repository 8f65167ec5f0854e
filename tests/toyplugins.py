"""One of each kind from outside: what a user's own module would hold, named in recipes as ``toyplugins:NAME``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import BinaryIO

import torch
from torch import Tensor, nn

from clasp.data.formats.base import SourceSpec
from clasp.data.formats.tables import TextTable, open_table
from clasp.data.formats.text_rows import DelimitedRows, LocatedRow
from clasp.data.images import ImageTransform
from clasp.models.backbone import Backbone
from clasp.models.structure import is_norm
from clasp.models.tuning.methods import TuningMethod, TuningSpec
from clasp.training.losses import LossMethod, info_nce
from clasp.training.optimizer import LrSchedule, ScheduleContext
from clasp.types import LossParts
from toytowers import base

NUMBER = 3

# --- losses ----------------------------------------------------------------------------------------------------------


def halved_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, *, groups=None) -> LossParts:
    """Half of InfoNCE, of logits that have no bias."""
    assert bias is None
    return LossParts(*(part / 2 for part in info_nce(image, text, scale, groups=groups)))


def squared_error(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, *, groups=None) -> LossParts:
    """Of logits that should be 1 on the diagonal and 0 elsewhere."""
    assert bias is not None
    error = (scale * image @ text.T + bias - torch.eye(len(image))).square().mean()
    return LossParts(error, error, error)


biased_loss = LossMethod(squared_error, init_logit_bias=-2.0)

# --- schedules and decay ---------------------------------------------------------------------------------------------


def linear_schedule(step: int, context: ScheduleContext) -> float:
    """Falls from 1 towards 0."""
    return 1 - step / context.steps


constant_schedule = LrSchedule(lambda step, context: 1.0, reads_warmup=False)


def decays_image_head(name: str, shape: Sequence[int]) -> bool:
    return name == "image_head.map.weight"


# --- tuning ----------------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    """A learned factor on the output of a module."""

    def __init__(self, start: float, device: torch.device):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start, device=device))

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * self.factor


def add_gain(net: nn.Module, tuning: TuningSpec) -> set[str]:
    """A gain behind the last norm of a net."""
    norm = [module for module in net.modules() if is_norm(module)][-1]
    gain = Gain(tuning.options["start"], next(norm.parameters()).device)
    net.add_module("gain", gain)
    norm.register_forward_hook(gain)
    return {"gain.factor"}


gain = TuningMethod(add_gain, stage=4, defaults={"start": 1.0}, added_parameters={"gain.factor": "from one"})


def last_norm(net: nn.Module, tuning: TuningSpec) -> set[str]:
    """A plain function does where there are no options."""
    name = [name for name, module in net.named_modules() if is_norm(module)][-1]
    return {f"{name}.weight", f"{name}.bias"}


# --- pairs -----------------------------------------------------------------------------------------------------------


def open_stars(spec: SourceSpec) -> TextTable:
    """Cells between stars."""
    return open_table(spec, partial(DelimitedRows.of, delimiter="*"))


class EveryOtherRow(DelimitedRows):
    def iter_rows(self, file: BinaryIO) -> Iterator[LocatedRow]:
        return islice(super().iter_rows(file), 0, None, 2)


def open_every_other(spec: SourceSpec) -> TextTable:
    """Every other row of a .csv."""
    return open_table(spec, partial(EveryOtherRow.of, delimiter=","))


def open_nothing(spec: SourceSpec) -> list:
    """What no format may return."""
    return []


# --- towers ----------------------------------------------------------------------------------------------------------


def image_tower() -> Backbone:
    return replace(base("vit"), transform=ImageTransform(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
