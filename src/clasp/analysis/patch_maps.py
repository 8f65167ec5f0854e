"""Maps of one image: the similarity of each of its patches to texts, and the attention of its class token.

Input: a model with its preprocessing, an encoded image, and texts. Output: ``PatchMaps`` on the grid of the patches, or
of the last feature map of a CNN. Note: the towers were trained on pooled vectors, not on patches. The embedding of a
patch is that of an image whose tokens were all like it: for mean pooling and a head that is linear in the pooled
features, the image's embedding is proportional to the mean of these before normalisation; elsewhere it is an
approximation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clasp.models.dual_encoder import DualEncoder
from clasp.models.inference import EmbeddingModel
from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.types import Pixels, UserError


@dataclass(frozen=True, slots=True)
class PatchMaps:
    """The maps of one image.

    ``picture``: what the tower reads, RGB from 0 to 1. ``cosines``: of every patch's embedding with every text.
    ``image_cosines``: of the image's own embedding. ``attention``: the share of each patch in the class token, by
    attention rollout, with sum 1; ``None`` where the tower has no class token or its attention cannot be recorded.
    """

    texts: tuple[str, ...]
    picture: Float[Tensor, "3 size size"]
    cosines: Float[Tensor, "T h w"]
    image_cosines: Float[Tensor, " T"]
    attention: Float[Tensor, "h w"] | None

    def to_dict(self) -> dict[str, Any]:
        """The maps as plain data for JSON, without the picture."""
        attention = None if self.attention is None else self.attention.tolist()
        return {
            "texts": list(self.texts),
            "cosines": self.cosines.tolist(),
            "image_cosines": self.image_cosines.tolist(),
            "attention": attention,
        }


@torch.inference_mode()
def compute_patch_maps(model: EmbeddingModel, image: bytes, texts: Sequence[str]) -> PatchMaps:
    """The maps of an encoded image for these texts, in float32.

    Raises ``ImageError``, and ``UserError`` for a tower whose output is not a grid of patches.
    """
    encoder, transform = model.encoder, model.transform
    assert isinstance(encoder, DualEncoder)
    pixels = transform(image)
    given = Pixels(pixels[None].to(model.device))
    pooled, attention = patch_vectors(encoder.image, given)
    embedded = F.normalize(encoder.image_head(pooled.flatten(0, 1)).float(), dim=-1).cpu()
    of_texts = model.encode_text(texts)
    mean, std = (torch.tensor(each)[:, None, None] for each in (transform.mean, transform.std))
    return PatchMaps(
        texts=tuple(texts),
        picture=(pixels * std + mean).clamp(0, 1),
        cosines=(of_texts @ embedded.T).unflatten(1, pooled.shape[:2]),
        image_cosines=of_texts @ encoder.embed_image(given).cpu()[0],
        attention=attention,
    )


class PatchVectors(NamedTuple):
    """What a tower makes of the patches of one image: the pooled vector of each, and the attention of the class token
    (``None``: see ``PatchMaps``)."""

    pooled: Float[Tensor, "h w Dp"]
    attention: Float[Tensor, "h w"] | None


def patch_vectors(tower: Tower, image: Pixels) -> PatchVectors:
    """Pool every patch of one image as if all tokens were like it; lower feature maps of a CNN are averaged over the
    cells of the last one. Raises ``UserError`` for a tower whose output is not a grid of patches."""
    structure = find_structure(tower.net)
    prefix, recorder = structure.prefix_tokens, _AttentionRecorder()
    with recorder:
        layers = tower.layer_states(image)
    count = layers[0].shape[1]
    side = _grid_side(tower.name, count, prefix)
    rows = [_on_grid(states[0, prefix:], side)[:, None].expand(-1, prefix + 1, -1) for states in layers]
    masks = [torch.ones(each.shape[:2], dtype=torch.bool, device=each.device) for each in rows]
    pooled = torch.cat(tower.pool_layers(rows, masks), dim=1).unflatten(0, (side, side))
    weights = [each[0] for each in recorder.weights if each.shape[-1] == count]
    if not structure.class_token or len(weights) != len(structure.blocks):
        return PatchVectors(pooled, None)
    shares = attention_rollout(weights)[0, prefix:].unflatten(0, (side, side))
    return PatchVectors(pooled, (shares / shares.sum()).cpu())


def attention_rollout(weights: Sequence[Float[Tensor, "H N N"]]) -> Float[Tensor, "N N"]:
    """The share of every input token in every output token: the product of ``(A + 1) / 2`` over the blocks, A being the
    mean over the heads (Abnar and Zuidema, ACL 2020, section 3). Rows sum to 1."""
    count = weights[0].shape[-1]
    rollout = identity = torch.eye(count, dtype=weights[0].dtype, device=weights[0].device)
    for block in weights:
        rollout = (block.mean(dim=0) + identity) / 2 @ rollout
    return rollout


# --- how -------------------------------------------------------------------------------------------------------------


def _grid_side(name: str, count: int, prefix: int) -> int:
    side = math.isqrt(max(0, count - prefix))
    if side * side != count - prefix or side < 2:
        raise UserError(
            f"{name} has no patches to map: its output is {count} tokens, of which {prefix} are not patches, and the "
            "others do not form a square grid; maps are for vision transformers and for CNNs with a feature map before "
            "the pooling"
        )
    return side


def _on_grid(tokens: Float[Tensor, "n D"], side: int) -> Float[Tensor, "patches D"]:
    """Tokens of a lower feature map, averaged over the cells of the last one."""
    lower = math.isqrt(len(tokens))
    if lower == side:
        return tokens
    assert lower * lower == len(tokens), f"{len(tokens)} tokens of a lower layer do not form a square"
    maps = tokens.T.unflatten(1, (lower, lower))
    return F.adaptive_avg_pool2d(maps, side).flatten(1).T


class _AttentionRecorder(TorchFunctionMode):
    """Records the attention weights of every call of ``scaled_dot_product_attention`` without mask, in order.

    Nets of any library call it; those with an attention of their own are not recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Float[Tensor, "B H N N"]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._record(*args, **options)
        return func(*args, **options)

    def _record(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
    ) -> None:
        scale = options.get("scale") or query.shape[-1] ** -0.5
        if attn_mask is None and query.shape == key.shape:
            self.weights.append((query.float() * scale @ key.float().mT).softmax(dim=-1))
