"""What a recipe trains: total and trainable parameters of each part, counted on shapes alone.

Input: a recipe. Output: ``ParameterReport``, for a table or for one JSON object. Note: no weights are loaded, so a
model that no machine at hand could hold is counted too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clasp.config.build import build_model
from clasp.config.recipe import Recipe
from clasp.models.dual_encoder import ParameterCount
from clasp.models.sharing.policy import SharingPlan


@dataclass(frozen=True, slots=True)
class ParameterReport:
    """Counts by part, the whole as ``model``; and what the towers share, where they do."""

    counts: dict[str, ParameterCount]
    sharing: SharingPlan | None

    def to_dict(self) -> dict[str, Any]:
        """The counts of the whole model, and those of each part under its name."""
        parts = {part: {**asdict(count), "percent": round(count.percent, 4)} for part, count in self.counts.items()}
        return {**parts.pop("model"), **parts}


def count_parameters(recipe: Recipe) -> ParameterReport:
    """The parameters of a recipe. Raises ``UserError`` as ``build_model`` does."""
    model = build_model(recipe, meta=True)
    return ParameterReport(model.parameter_counts(), model.sharing)
