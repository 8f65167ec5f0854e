"""Patch dropout: a fraction of the patch tokens of each image is left out of the blocks that train.

Input: the hidden states of an image tower before its first block that trains. Output: the states of the class and
register tokens and of a random subset of the patches, equally many in each image. After FLIP (Li et al., CVPR 2023,
section 3) and PatchDropout (Liu et al., WACV 2023, section 3). Note, and how ours differs: tokens are dropped after the
frozen prefix instead of after the patch embedding, so that its cached states serve every step; and whether a net
allows it is measured: a permutation of the patches must permute its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clasp.models.partial_forward import count_frozen_blocks
from clasp.models.probe import FORWARD_ERRORS, relative_difference
from clasp.models.structure import ModelStructure
from clasp.types import UserError

# measured on tiny random nets: another order of the patches moves states by at most 2e-7; with rotary positions by 0.08
_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
_LOW_PRECISION_TOLERANCE = 0.02
_VALID = "choose a ViT with absolute positions (ViT, DeiT, DINOv2, CLIP, SigLIP), or leave patch_dropout out"


@dataclass(slots=True)
class PatchDropout:
    """Patch dropout before one block of a net; ``prefix_tokens`` precede the patches and are kept.

    Active while ``training``. Tokens are drawn from the default generator of the states' device, which a training step
    seeds: a run repeats, and gradient caching drops the same tokens in both of its passes.
    """

    rate: float
    block: str
    prefix_tokens: int
    training: bool = False

    def register(self, net: nn.Module) -> RemovableHandle:
        """Drop tokens in the forward passes of ``net`` until the handle is removed."""
        return _change_block_input(net, self.block, lambda states: _take_tokens(states, self._draw(states)))

    def kept_patches(self, patches: int) -> int:
        """The number of patches of an image that are kept, at least one; open_clip rounds down."""
        return max(1, round(patches * (1 - self.rate)))

    def _draw(self, states: Float[Tensor, "B N D"]) -> Int[Tensor, "B kept"]:
        """The indices of the kept tokens, ascending."""
        rows, tokens, _ = states.shape
        patches = tokens - self.prefix_tokens
        order = torch.rand(rows, patches, device=states.device).argsort(dim=1)
        kept = order[:, : self.kept_patches(patches)].sort(dim=1).values + self.prefix_tokens
        return torch.cat((_prefix_indices(self.prefix_tokens, kept), kept), dim=1)


def place_patch_dropout(
    name: str,
    net: nn.Module,
    structure: ModelStructure,
    rate: float,
    *,
    trained: Iterable[str],
    encode: Callable[[], Tensor],
) -> PatchDropout:
    """Patch dropout before the first block of ``net`` that trains, for the tower ``name``.

    ``trained``: names of trainable parameters, relative to the net. ``encode`` returns the hidden states of two
    different images. Raises ``UserError`` where no block trains, and for a net whose output is wrong without some of
    its patches.
    """
    depth = count_frozen_blocks(structure, trained)
    if depth == len(structure.blocks):
        raise UserError(
            f"image.patch_dropout = {rate:g}: no block of {name} trains, so that no step would be shorter; leave it "
            "out, or tune blocks with tune.image"
        )
    dropout = PatchDropout(rate, structure.blocks[depth].path, structure.prefix_tokens)
    with torch.no_grad():
        reason = _reason_against(net, structure, dropout, encode)
    if reason:
        raise UserError(f"image.patch_dropout = {rate:g}: {name} ({structure.family}) {reason}; {_VALID}")
    return dropout


# --- how -------------------------------------------------------------------------------------------------------------


def _reason_against(
    net: nn.Module, structure: ModelStructure, dropout: PatchDropout, encode: Callable[[], Tensor]
) -> str | None:
    """Why patches of ``net`` cannot be dropped; ``None`` where they can."""
    first, lowest = (_block_input(net, path, encode) for path in (structure.blocks[0].path, dropout.block))
    if first is None or lowest is None:
        return "does not run its blocks one after another"
    if first.ndim != 3 or lowest.ndim != 3 or first.shape[1] != lowest.shape[1]:
        return "computes on feature maps, not on a sequence of patches"
    prefix = dropout.prefix_tokens
    constant = (first[0] == first[1]).all(dim=1)  # tokens that are the same for every image
    if not constant[:prefix].all() or constant[prefix:].any():
        return f"has tokens that are not patches beside the first {prefix}"
    one, other, order = _shuffled_patches(lowest, prefix)
    try:
        expected, shuffled = (_encode_tokens(net, dropout.block, index, encode) for index in (one, other))
    except FORWARD_ERRORS:
        return "fixes the number of patches inside its blocks (windows, relative or rotary positions)"
    if expected.shape[:2] != (len(lowest), one.shape[1]):
        return "returns other states than those of its patches"
    expected = expected[:, torch.cat((order.new_tensor(range(prefix)), prefix + order))]
    if relative_difference(shuffled, expected) > _TOLERANCE.get(shuffled.dtype, _LOW_PRECISION_TOLERANCE):
        return "reads the positions of its patches inside its blocks (windows, relative or rotary positions)"
    return None


def _shuffled_patches(
    states: Float[Tensor, "B N D"], prefix: int
) -> tuple[Int[Tensor, "B kept"], Int[Tensor, "B kept"], Int[Tensor, " some"]]:
    """Two selections of the same two thirds of the patches behind the prefix tokens, and the permutation between them:
    the patches of the second are those of the first, in that order."""
    generator = torch.Generator().manual_seed(0)
    patches = states.shape[1] - prefix
    some = torch.randperm(patches, generator=generator)[: max(1, patches - patches // 3)].sort().values
    order = torch.randperm(len(some), generator=generator)

    def index(chosen: Tensor) -> Tensor:
        return torch.cat((torch.arange(prefix), prefix + chosen)).to(states.device).expand(len(states), -1)

    return index(some), index(some[order]), order.to(states.device)


def _encode_tokens(
    net: nn.Module, block: str, index: Int[Tensor, "B kept"], encode: Callable[[], Tensor]
) -> Float[Tensor, "B _ D"]:
    """The output of ``encode`` where the block at this path reads the tokens of ``index`` only."""
    handle = _change_block_input(net, block, lambda states: _take_tokens(states, index))
    try:
        return encode()
    finally:
        handle.remove()


def _block_input(net: nn.Module, block: str, encode: Callable[[], Tensor]) -> Tensor | None:
    """The states that the block at this path reads; ``None`` where it is not called."""
    found: list[Tensor] = []
    handle = _change_block_input(net, block, lambda states: found.append(states) or states)
    try:
        encode()
    finally:
        handle.remove()
    return found[0] if found else None


def _change_block_input(net: nn.Module, block: str, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Apply ``change`` to the states that a block reads, before any other hook of the block (that of prompts)."""

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return net.get_submodule(block).register_forward_pre_hook(before, prepend=True, with_kwargs=True)


def _take_tokens(states: Float[Tensor, "B N D"], index: Int[Tensor, "B kept"]) -> Float[Tensor, "B kept D"]:
    return states.gather(1, index[:, :, None].expand(-1, -1, states.shape[2]))


def _prefix_indices(count: int, like: Int[Tensor, "B _"]) -> Int[Tensor, "B prefix"]:
    return torch.arange(count, device=like.device).expand(len(like), -1)
