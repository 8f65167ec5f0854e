"""Weight tying between an image encoder and a text encoder.

Input: two native encoders and a policy. Output: the same encoders, holding the same parameter objects wherever the
policy says shared. Note: modules stay separate and parameters are shared, since hooks, PEFT wrappers and a truncated
forward belong to one modality and would otherwise act on both. ``named_parameters`` of a module that contains both
encoders yields each tensor once, under its name in the first encoder; ``parameter_aliases`` gives its other names.
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
from clasp.models.transformer.blocks import Block
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.models.transformer.settings import BlockSettings
from clasp.types import UserError

# settings that must be equal in both encoders for a part to be shared
_REQUIRED_EQUAL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ATTENTION_PARTS, ("width", "heads")),
    "qk_norm": ("width", "heads", "norm"),
    "ffn": ("width", "hidden", "activation"),
    "norm1": ("width", "norm", "norm_position"),
    "norm2": ("width", "norm", "norm_position"),
    "layer_scale": ("width",),
}


class LowRankLinear(nn.Module):
    """``x W + b + (x A) B``: a shared linear layer and a low-rank update that belongs to one encoder.

    ``B`` starts at zero, so the update starts at zero (LoRA, Hu et al., ICLR 2022, without its scaling factor).
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
        """The parameters that are not shared."""
        return self.down, self.up

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch _"]:
        return self.shared(x) + F.linear(F.linear(x, self.down), self.up)


class SplitQKV(nn.Module):
    """A packed QKV projection split into three linear layers, so that each can be shared separately."""

    def __init__(self, packed: nn.Linear):
        super().__init__()
        for name, weight, bias in zip("qkv", packed.weight.chunk(3), packed.bias.chunk(3), strict=True):
            part = nn.Linear(packed.in_features, len(weight), device="meta")
            part.weight, part.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
            self.add_module(name, part)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch _"]:
        return torch.cat([part(x) for part in self.children()], dim=-1)


class TiedEncoders(nn.Module):
    """An image encoder and a text encoder tied by one policy; both are modified in place.

    Its state dict holds each tensor once, under its first name, and it loads from such a state dict. ``keep`` is the
    encoder whose weights become the shared ones: the pre-trained one. Low-rank updates are initialised from ``seed``.
    Raises ``UserError`` for a policy that does not fit the encoders.
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


def share_weights(
    image: ImageTransformer, text: TextTransformer, policy: SharingSettings, *, keep: Literal["image", "text"] = "image"
) -> SharingPlan:
    """Tie the parameters of two encoders in place according to ``policy``; returns the resolved policy.

    Layers are counted from 0 in both encoders; a stem is layer 0 of the image encoder and is never shared. Heads are
    not part of an encoder: apply ``tie_parameters`` to them where ``SharingPlan.head`` is shared. Raises ``UserError``
    where a part cannot be shared.
    """
    first = image.settings.first_layer
    sharing = policy.resolve(max(first + len(image.blocks), len(text.blocks)))
    tied: list[tuple[Mapping[str, SharingMode], Block, Block]] = []
    for number, row in enumerate(sharing.layers):
        if set(row.values()) == {"separate"}:
            continue
        image_block, text_block = _block_at(image.blocks, number - first), _block_at(text.blocks, number)
        if image_block is None or text_block is None:
            raise UserError(_missing_layer_message(number, image_block is None, first))
        _check_shareable(number, row, image.settings, text.settings)
        tied.append((row, image_block, text_block))
    if sharing.final_norm == "shared":
        for net, settings in (("image", image.settings), ("text", text.settings)):
            if settings.norm_position == "post":
                raise UserError(
                    f"share.final_norm = 'shared': the blocks of the {net} net end with a norm, and no other"
                )
        _check_equal_settings("share.final_norm = 'shared'", "norm1", image.settings, text.settings)
        tie_parameters(*((image.norm, text.norm) if keep == "image" else (text.norm, image.norm)))
    for row, image_block, text_block in tied:
        _share_block(row, *((image_block, text_block) if keep == "image" else (text_block, image_block)))
    return replace(sharing, absent_parts=frozenset(_absent_parts(image.settings) & _absent_parts(text.settings)))


def tie_parameters(source: nn.Module, target: nn.Module) -> None:
    """Make every parameter of ``target`` the same object as in ``source``; names and shapes must be equal."""
    parameters = dict(source.named_parameters())
    shapes = {name: p.shape for name, p in target.named_parameters()}
    assert shapes == {name: p.shape for name, p in parameters.items()}, "only modules of equal shapes can be tied"
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(owner), leaf, parameter)


def parameter_aliases(module: nn.Module) -> dict[str, str]:
    """Every further name of a shared parameter, mapped to its first name: the one in ``named_parameters``."""
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
    """Raises ``UserError`` unless every part to be shared exists in both encoders, with equal shape and kind."""
    for part, mode in row.items():
        if mode == "separate":
            continue
        cannot = f"share: layer {number} cannot share {_part_name(part)}"
        for net, settings in (("image", image), ("text", text)):
            if part in _absent_parts(settings):
                raise UserError(f"{cannot}: the blocks of the {net} net have none")
        _check_equal_settings(cannot, part, image, text)


def _check_equal_settings(cannot: str, part: str, image: BlockSettings, text: BlockSettings) -> None:
    for name in _REQUIRED_EQUAL[part]:
        one, other = _setting(image, name), _setting(text, name)
        if one != other:
            raise UserError(f"{cannot}: {name} is {one} in the image net and {other} in the text net")


def _setting(settings: BlockSettings, name: str) -> Any:
    return settings.mlp_width if name == "hidden" else settings.model_dump()[name]


def _absent_parts(settings: BlockSettings) -> set[str]:
    present = {"qk_norm": settings.qk_norm, "layer_scale": settings.layer_scale is not None}
    return {part for part, exists in present.items() if not exists}


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
    """Tie the linear layer ``name`` of both modules."""
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
