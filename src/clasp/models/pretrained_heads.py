"""The start of a dual encoder from an existing one: ``head.init = "pretrained"``.

Input: both towers, with the ``PretrainedHead`` that their backbones brought. Output: the projection of each and the
logit scale and bias of both, for ``DualEncoder`` to copy; or a ``UserError`` that names the key to change. Note: one
tower may come without; its head is then random, with a warning.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from clasp.models.backbone import PretrainedHead
from clasp.models.head_settings import HeadSettings
from clasp.models.tower import Tower
from clasp.types import UserError

_log = logging.getLogger(__name__)
_RANDOM = "set head.init = 'random'"
_TOLERANCE = 1e-3  # CLIP's logit scale, clamped to 100, is 100.00001 in float32


class PretrainedHeads(NamedTuple):
    """The pre-trained head of each tower; at least one is not ``None``."""

    image: PretrainedHead | None
    text: PretrainedHead | None

    @property
    def _any(self) -> PretrainedHead:
        found = self.image or self.text
        assert found is not None
        return found

    @property
    def logit_bias(self) -> Float[Tensor, ""] | None:
        """The logit bias, for a loss that has one."""
        return self._any.logit_bias

    def logit_scale(self, scale_range: tuple[float, float]) -> float | None:
        """The logit scale, not its logarithm; ``None`` on the meta device. Raises ``UserError`` outside the range."""
        if self._any.log_scale.is_meta:
            return None
        scale, (least, greatest) = math.exp(float(self._any.log_scale)), scale_range
        if not least * (1 - _TOLERANCE) <= scale <= greatest * (1 + _TOLERANCE):
            raise UserError(
                f"loss.scale_range = [{least:g}, {greatest:g}]: the logit scale of the checkpoint is {scale:.4g}; "
                f"widen the range, or {_RANDOM}"
            )
        return scale


def find_pretrained_heads(image: Tower, text: Tower, settings: HeadSettings) -> PretrainedHeads:
    """The pre-trained heads of two towers, checked against ``[head]`` and the pooled vectors.

    Raises ``UserError`` where neither tower has one, where they are halves of two dual encoders, and for a pooling, a
    width or a kind of head that does not fit.
    """
    for tower in (image, text):
        if tower.pretrained_head is not None:
            _require_fit(tower, tower.pretrained_head, settings)
    heads = PretrainedHeads(image.pretrained_head, text.pretrained_head)
    if heads.image is None and heads.text is None:
        raise UserError(
            f"head.init = 'pretrained': neither {image.name} nor {text.name} comes with a projection; write clip:… or "
            f"open_clip:… for a tower, or {_RANDOM}"
        )
    if heads.image is not None and heads.text is not None and image.name != text.name:
        raise UserError(
            f"head.init = 'pretrained': {image.name} and {text.name} are halves of two dual encoders, whose embeddings "
            f"are in different spaces; write one of them for both towers, or {_RANDOM}"
        )
    for tower in (image, text):
        if tower.pretrained_head is None:
            _log.warning("%s comes without a projection: its head is initialised at random", tower.name)
    return heads


def warn_of_unused_heads(*towers: Tower) -> None:
    """Log a warning for each tower whose projection is left out."""
    for tower in towers:
        if tower.pretrained_head is not None:
            _log.warning(
                "%s: its projection is not used and the head initialised at random; head.init = 'pretrained' starts "
                "from it",
                tower.name,
            )


def _require_fit(tower: Tower, found: PretrainedHead, settings: HeadSettings) -> None:
    if not tower.pools_as_authors:
        side = tower.modality
        raise UserError(
            f"head.init = 'pretrained': the projection of {tower.name} is of {side}.pool = {tower.authors_pool!r} of "
            f"the last states; leave {side}.pool and {side}.extra_layers out, or {_RANDOM}"
        )
    width = tower.width if found.weight is None else found.weight.shape[0]
    if width != settings.width:
        raise UserError(
            f"head.width = {settings.width}: the embeddings of {tower.name} are {width} wide; set head.width = {width}"
            f", or {_RANDOM}"
        )
    if found.weight is not None and settings.kind == "none":
        raise UserError(
            f"head.kind = 'none': {tower.name} has a projection from {found.weight.shape[1]} to {width}, which takes "
            f"head.kind = 'linear' to start from"
        )
