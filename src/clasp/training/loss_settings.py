"""The part of ``[loss]`` of a recipe that selects the loss, its positives and its negatives.

Data only; ``losses.build_loss`` knows which losses there are. Note: nothing here imports torch, so that a recipe is
checked at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from clasp.errors import UserError
from clasp.plain_types import MAX_COUNT


class LossSettings(BaseModel):
    """The part of ``[loss]`` that selects the loss, its positives and its negatives."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = "infonce"
    """A key of ``clasp.training.losses.LOSSES``, or ``package.module:Name`` for a function or ``LossMethod``"""
    positives: Literal["groups", "diagonal"] = "groups"
    """``groups``: a pair's positives are all pairs of its group or of its caption's text; ``diagonal``: itself alone,
    so that another caption of the same image is a negative (LilT)"""
    negatives: Annotated[int, Field(gt=1, le=MAX_COUNT)] | Literal["all"] = "all"
    """``all``: those in the whole batch. A number: those in a part of the batch, of so many pairs; the loss is the mean
    over the parts (LilT: 128, the pairs on one of four devices). Where the batch is no multiple of it, the parts are as
    few as will do, alike in size but for one pair, and each counts by its pairs"""

    def require_batch_size(self, batch: int) -> None:
        """Raises ``UserError`` where ``negatives`` is larger than the batch size, which would have no effect."""
        if self.negatives != "all" and self.negatives > batch:
            raise UserError(
                f"loss.negatives = {self.negatives} is more than the {batch} pairs of a batch (train.batch_size); "
                f"at most {batch}, or 'all'"
            )
