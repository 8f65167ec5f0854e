"""Two nets that hold weights in common: one trunk, two views.

In go an image net, a text net and a policy; the nets come out holding the same parameter objects where the policy says
shared. Modules stay each net's own, parameters are what is shared: hooks, peft's wraps and a cut belong to one modality
and would otherwise fire for both. Nobody above can tell: ``named_parameters`` of whatever holds both nets counts each
tensor once, under the name it has in the net that comes first, and ``parameter_aliases`` says which other names it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.sharing.policy import ATTENTION_PARTS, LowRankSharing, SharingMode, SharingPlan, SharingSettings
from clasp.models.transformer.blocks import Block, BlockSettings
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer, init_weights
from clasp.types import UserError

# settings of the two nets that must be equal where a part is shared
_REQUIRED_EQUAL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ATTENTION_PARTS, ("width", "heads")),
    "qk_norm": ("width", "heads", "norm"),
    "ffn": ("width", "hidden", "activation"),
    "norm1": ("width", "norm", "norm_position"),
    "norm2": ("width", "norm", "norm_position"),
    "layer_scale": ("width",),
}


class LowRankLinear(nn.Module):
    """``x W + b + (x A) B``: a linear map that others hold too, and a difference of low rank that is this net's own.

    ``B`` starts at zero, so the difference starts as none (LoRA, Hu et al., ICLR 2022, without its factor).
    """

    def __init__(self, shared: nn.Linear, rank: int):
        super().__init__()
        self.shared = shared
        self.down = nn.Parameter(shared.weight.new_empty(rank, shared.in_features))
        self.up = nn.Parameter(shared.weight.new_zeros(shared.out_features, rank))
        if not self.down.is_meta:
            nn.init.normal_(self.down, std=shared.in_features**-0.5)

    @property
    def low_rank_parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """What no other net holds."""
        return self.down, self.up

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch _"]:
        return self.shared(x) + F.linear(F.linear(x, self.down), self.up)


class SplitQKV(nn.Module):
    """Queries, keys and values by three linear maps where one packed map stood, so that each can be shared alone."""

    def __init__(self, packed: nn.Linear):
        super().__init__()
        for name, weight, bias in zip("qkv", packed.weight.chunk(3), packed.bias.chunk(3), strict=True):
            part = nn.Linear(packed.in_features, len(weight), device="meta")
            part.weight, part.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
            self.add_module(name, part)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch _"]:
        return torch.cat([part(x) for part in self.children()], dim=-1)


class TiedEncoders(nn.Module):
    """An image net and a text net under one policy. Takes both over.

    Its state dict holds each tensor once, under its first name, and loads from such a one. ``keep`` is the net whose
    weights both have afterwards where they are shared: the one that is trained already. Low-rank differences start from
    ``seed``. Raises ``UserError`` for a policy that does not fit the nets.
    """

    def __init__(
        self,
        image: ImageTransformer,
        text: TextTransformer,
        policy: SharingSettings,
        *,
        seed: int,
        keep: Literal["image", "text"] = "image",
    ):
        super().__init__()
        self.image, self.text, self.policy = image, text, policy
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.sharing = share_weights(image, text, policy, keep=keep)
        self.register_state_dict_post_hook(_drop_aliases)
        self.register_load_state_dict_pre_hook(_restore_aliases)


def tied_from_scratch(
    image: ImageTransformer, text: TextTransformer, policy: SharingSettings, *, seed: int
) -> TiedEncoders:
    """A pair whose every weight starts from ``seed``, as ``init_weights`` says."""
    init_weights(image, seed=seed)
    init_weights(text, seed=seed + 1)
    return TiedEncoders(image, text, policy, seed=seed + 2)


def share_weights(
    image: ImageTransformer, text: TextTransformer, policy: SharingSettings, *, keep: Literal["image", "text"] = "image"
) -> SharingPlan:
    """Make two nets hold the same parameters where ``policy`` says so, in place; returns the policy layer by layer.

    Layers are counted from 0 in both nets; a stem is layer 0 of the image net, and is never shared. Heads are no part
    of a net: ``tie_parameters`` them where ``SharingPlan.head`` says shared. Raises ``UserError`` where the nets cannot
    share a part.
    """
    first = image.settings.first_layer
    sharing = policy.resolve(max(first + len(image.blocks), len(text.blocks)))
    both: list[tuple[Mapping[str, SharingMode], Block, Block]] = []
    for number, row in enumerate(sharing.layers):
        if set(row.values()) == {"separate"}:
            continue
        ours, theirs = _block_at(image.blocks, number - first), _block_at(text.blocks, number)
        if ours is None or theirs is None:
            raise UserError(_missing_layer_message(number, ours is None, first))
        _check_shareable(number, row, image.settings, text.settings)
        both.append((row, ours, theirs))
    if sharing.final_norm == "shared":
        for net, settings in (("image", image.settings), ("text", text.settings)):
            if settings.norm_position == "post":
                raise UserError(
                    f"share.final_norm = 'shared': the blocks of the {net} net end with a norm, and no other"
                )
        _check_equal_settings("share.final_norm = 'shared'", "norm1", image.settings, text.settings)
        tie_parameters(*((image.norm, text.norm) if keep == "image" else (text.norm, image.norm)))
    for row, ours, theirs in both:
        _share_block(row, *((ours, theirs) if keep == "image" else (theirs, ours)))
    return replace(sharing, absent_parts=frozenset(_absent_parts(image.settings) & _absent_parts(text.settings)))


def tie_parameters(source: nn.Module, target: nn.Module) -> None:
    """Make every parameter of ``target`` the same object as that of ``source``; both have the same names and shapes."""
    given = dict(source.named_parameters())
    shapes = {name: p.shape for name, p in target.named_parameters()}
    assert shapes == {name: p.shape for name, p in given.items()}, "only like modules can hold the same parameters"
    for name, parameter in given.items():
        owner, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(owner), leaf, parameter)


def parameter_aliases(module: nn.Module) -> dict[str, str]:
    """Every further name of a parameter, with its first name: the one that ``named_parameters`` gives."""
    first: dict[int, str] = {}
    names = module.named_parameters(remove_duplicate=False)
    return {name: known for name, p in names if (known := first.setdefault(id(p), name)) != name}


# --- how -------------------------------------------------------------------------------------------------------------


def _block_at(blocks: nn.ModuleList, number: int) -> Block | None:
    if not 0 <= number < len(blocks):
        return None
    block = blocks[number]
    assert isinstance(block, Block)
    return block


def _missing_layer_message(number: int, in_image: bool, first: int) -> str:
    if in_image and number < first:
        return f"share: layer {number} of the image net is its stem, which no text can share; write layers = '{first}:'"
    net = "image" if in_image else "text"
    return f"share: there is no layer {number} in the {net} net to share; write share.layers = ':{number}'"


def _check_shareable(number: int, row: Mapping[str, SharingMode], image: BlockSettings, text: BlockSettings) -> None:
    """``UserError`` unless every part that is to be shared is in both nets, and of one shape and kind."""
    for part, how in row.items():
        if how == "separate":
            continue
        cannot = f"share: layer {number} cannot share {_part_name(part)}"
        for net, settings in (("image", image), ("text", text)):
            if part in _absent_parts(settings):
                raise UserError(f"{cannot}: the blocks of the {net} net have none")
        _check_equal_settings(cannot, part, image, text)


def _check_equal_settings(cannot: str, part: str, image: BlockSettings, text: BlockSettings) -> None:
    for fact in _REQUIRED_EQUAL[part]:
        one, other = _setting(image, fact), _setting(text, fact)
        if one != other:
            raise UserError(f"{cannot}: {fact} is {one} in the image net and {other} in the text net")


def _setting(settings: BlockSettings, name: str) -> Any:
    return settings.mlp_width if name == "hidden" else settings.model_dump()[name]


def _absent_parts(settings: BlockSettings) -> set[str]:
    there = {"qk_norm": settings.qk_norm, "layer_scale": settings.layer_scale is not None}
    return {part for part, has in there.items() if not has}


def _part_name(part: str) -> str:
    return f"{part} of the attention" if part in ATTENTION_PARTS else part


def _share_block(row: Mapping[str, SharingMode], source: Block, target: Block) -> None:
    if len({row[part] for part in "qkv"}) == 1:
        _share_linear(row["q"], source.attn, target.attn, "qkv")
    else:
        for attention in (source.attn, target.attn):
            assert isinstance(attention.qkv, nn.Linear)
            attention.qkv = SplitQKV(attention.qkv)
        for part in "qkv":
            _share_linear(row[part], source.attn.qkv, target.attn.qkv, part)
    _share_linear(row["o"], source.attn, target.attn, "proj")
    for name in ("fc1", "fc2"):
        _share_linear(row["ffn"], source.mlp, target.mlp, name)
    for part, norms in {"norm1": ["norm1"], "norm2": ["norm2"], "qk_norm": ["attn.q_norm", "attn.k_norm"]}.items():
        if row[part] == "shared":
            for path in norms:
                tie_parameters(source.get_submodule(path), target.get_submodule(path))
    if row["layer_scale"] == "shared":
        target.gamma_1, target.gamma_2 = source.gamma_1, source.gamma_2


def _share_linear(mode: SharingMode, source: nn.Module, target: nn.Module, name: str) -> None:
    """``name`` is a linear map in both."""
    if mode == "separate":
        return
    one, other = source.get_submodule(name), target.get_submodule(name)
    assert isinstance(one, nn.Linear) and isinstance(other, nn.Linear)
    tie_parameters(one, other)
    if isinstance(mode, LowRankSharing):
        if mode.rank * (one.in_features + one.out_features) >= one.weight.numel():
            raise UserError(
                f"share: low-rank = {mode.rank} has more weights than the {one.in_features} x {one.out_features} "
                "matrix that it differs from; write 'separate'"
            )
        setattr(source, name, LowRankLinear(one, mode.rank))
        setattr(target, name, LowRankLinear(other, mode.rank))


def _drop_aliases(pair: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in parameter_aliases(pair):
        del state[prefix + name]


def _restore_aliases(pair: nn.Module, state: dict[str, Any], prefix: str, *more: Any) -> None:
    for name, first in parameter_aliases(pair).items():
        if prefix + first in state:
            state[prefix + name] = state[prefix + first]
