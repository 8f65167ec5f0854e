"""An existing dual encoder as a recipe that trains nothing in its towers: for evaluation beside runs.

Input: ``clip:NAME`` or ``open_clip:NAME``, as for ``image.tower``. Output: a ``Recipe`` of both towers with the heads
and the logit scale of the checkpoint, whose model embeds as the original does. Note: the width of the embeddings is
read from the configuration, without the weights.
"""

from __future__ import annotations

from typing import Any

from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings
from clasp.models.zoo.registry import load_backbone

DUAL_ENCODER_SCHEMES = ("clip", "open_clip")
"""Tower sources (``TOWER_SOURCES``) that open both halves of a dual encoder"""


def pretrained_recipe(tower: str) -> Recipe:
    """The recipe of the dual encoder ``tower``. Raises ``UserError`` where it cannot be opened."""
    backbone = load_backbone(ImageTowerSettings(tower=tower), meta=True)
    found = backbone.pretrained_head
    assert found is not None, f"{tower} is half of a dual encoder"
    head: dict[str, Any] = {"init": "pretrained"}
    if found.weight is None:
        head |= {"kind": "none", "width": Tower(backbone).width}
    else:
        head |= {"kind": "linear", "bias": False, "width": found.weight.shape[0]}
    settings = {
        "image": {"tower": tower},
        "text": {"tower": tower},
        "head": head,
        "loss": {"scale_range": [0.0, float("inf")]},
        "train": {"precision": "float32"},
    }
    return recipe_from_dict(settings, tower)
