"""``[auto]`` of a recipe: the budget of ``clasp train auto``, in minutes or in gradient steps.

Data only: ``clasp.config.auto_plan`` turns it into stages. Note: minutes are measured on the machine at hand; the same
budget in steps gives the same stages, and bitwise the same weights, on every machine of the same kind.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clasp.errors import counted
from clasp.plain_types import MAX_COUNT

LEAST_MINUTES = 0.5
"""About what features and heads in closed form take on two cores, however few the pairs"""


class AutoSettings(BaseModel):
    """``[auto]``: layers, heads, tuning methods and epochs are chosen on validation, within a budget."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: float | None = Field(default=None, gt=0, le=1_000_000, allow_inf_nan=False)
    """Wall time in minutes, features and evaluations included. The closed form, which comes first, is always finished,
    however small the budget"""
    steps: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    """Gradient steps in place of minutes"""

    @model_validator(mode="after")
    def _one_budget(self) -> AutoSettings:
        if (self.minutes is None) == (self.steps is None):
            given = "neither" if self.minutes is None else f"minutes = {self.minutes:g} and steps = {self.steps}"
            raise ValueError(
                f"one budget is needed, minutes or steps; here {given} (clasp train --minutes or --steps replaces it)"
            )
        return self

    @property
    def announcement(self) -> str:
        """What the budget is of, and what is done whatever it is."""
        first = "features of all pairs and heads in closed form"
        if self.minutes is None:
            return f"budget: {self} of tuning; {first} take no step"
        least = f" (about {LEAST_MINUTES:g} minutes are needed on two cores)" if self.minutes < LEAST_MINUTES else ""
        first += f" are finished even where they take longer{least}"
        return f"budget: {self} in all; {first}, tuning gets what is left"

    def __str__(self) -> str:
        if self.minutes is not None:
            return f"{self.minutes:g} minute{'' if self.minutes == 1 else 's'}"
        assert self.steps is not None
        return counted(self.steps, "step")
