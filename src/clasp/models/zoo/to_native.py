"""Converts pre-trained transformers of other libraries to native encoders: ViT, DINOv2 and the BERT family.

Input: a ``Backbone`` whose model class is in ``WEIGHT_MAPPINGS``. Output: the same ``Backbone`` with an
``ImageTransformer`` or a ``TextTransformer`` of equal output (measured: 1e-5). A model with unmapped parameters is
refused. Note: two tables are merged where that is exact: BERT's token type 0 is added to each position, and RoBERTa's
positions lose the rows below that of the first token. An image encoder is built for one size, and its position
embedding interpolated to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clasp.models.backbone import Backbone
from clasp.models.structure import find_unused_modules, is_transformers_model
from clasp.models.transformer.bert import BertEncoder
from clasp.models.transformer.deit import resize_pos_embed
from clasp.models.transformer.dinov2 import Dinov2Encoder
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.models.transformer.settings import BlockSettings, ImageTransformerSettings, TextTransformerSettings
from clasp.types import UserError

_ACTIVATION_NAMES = {"gelu": "gelu", "quick_gelu": "quick-gelu"}
_LeafNames = tuple[str, ...]
_WEIGHT_AND_BIAS: _LeafNames = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class WeightMapping:
    """Parameter names of a model family: the path of a block (``blocks``, formatted with its number), then of its
    parts."""

    blocks: str
    qkv: tuple[str, str, str]
    parts: Mapping[str, str]
    """native module path to the family's; modules with a weight and a bias"""
    read: Callable[[Backbone, _ForeignWeights], ImageTransformer | TextTransformer]
    layer_scales: tuple[str, ...] = ()
    """the two layer scale vectors"""
    post_norm: bool = False
    """whether norms follow the residual sums"""


def to_native(base: Backbone) -> Backbone:
    """The same tower as a native encoder; a native encoder is returned unchanged.

    An image encoder is built for the image size of the backbone's transform, else of its configuration. Native encoders
    have no dropout. Raises ``UserError`` for an unsupported family, naming the supported ones, and for parts that
    native encoders do not have.
    """
    if isinstance(base.net, ImageTransformer | TextTransformer):
        return base
    name = type(base.net).__name__
    if name not in WEIGHT_MAPPINGS:
        raise _unsupported(base, _UNSUPPORTED.get(name, "are not supported"))
    if base.forward_features is not None:
        raise _unsupported(base, "have a custom forward pass")
    source = _ForeignWeights(base)
    net = WEIGHT_MAPPINGS[name].read(base, source)
    source.require_all_used()
    return replace(base, net=net.eval(), weight_hashes=None)


class _ForeignWeights:
    """The tensors of a model to be converted; each is taken once."""

    def __init__(self, base: Backbone):
        self.base, self.family = base, WEIGHT_MAPPINGS[type(base.net).__name__]
        unused = tuple(f"{path}." for path in find_unused_modules(base.net))
        tensors = {name: p.detach() for name, p in base.net.named_parameters()}
        self._remaining = {name: tensor for name, tensor in tensors.items() if not f"{name}.".startswith(unused)}
        self.config: dict[str, Any] = _configuration(base.net)

    def take(self, name: str) -> Tensor:
        if name not in self._remaining:
            raise _unsupported(self.base, f"lack {name!r}")
        return self._remaining.pop(name)

    def take_optional(self, name: str) -> Tensor | None:
        return self._remaining.pop(name, None)

    def require_all_used(self) -> None:
        if self._remaining:
            first, *more = sorted(self._remaining)
            raise _unsupported(self.base, f"also have {first!r}{f' and {len(more)} more' if more else ''}")

    def blocks(self) -> dict[str, Tensor]:
        """The tensors of all blocks under native names."""
        numbers = range(self.block_count())
        return {name: tensor for number in numbers for name, tensor in self._block(number).items()}

    def block_count(self) -> int:
        """Number of blocks: a tower may have been truncated to its first ones."""
        return int(self.config["num_hidden_layers"])

    def _block(self, number: int) -> dict[str, Tensor]:
        source, native = self.family.blocks.format(number), f"blocks.{number}"
        found: dict[str, Tensor] = {}
        for leaf in _WEIGHT_AND_BIAS:
            found[f"{native}.attn.qkv.{leaf}"] = torch.cat([self.take(f"{source}.{q}.{leaf}") for q in self.family.qkv])
            for path, part in self.family.parts.items():
                found[f"{native}.{path}.{leaf}"] = self.take(f"{source}.{part}.{leaf}")
        for name, gamma in zip(("gamma_1", "gamma_2"), self.family.layer_scales, strict=False):
            found[f"{native}.{name}"] = self.take(f"{source}.{gamma}")
        return found

    def block_settings(self, blocks: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fields of ``BlockSettings``, from shapes where possible and from the configuration otherwise."""
        hidden, width = blocks["blocks.0.mlp.fc1.weight"].shape
        activation, packed = self.config["hidden_act"], blocks["blocks.0.attn.qkv.weight"].shape[0]
        if activation not in _ACTIVATION_NAMES:
            raise _unsupported(self.base, f"have activation {activation!r}, not {' or '.join(_ACTIVATION_NAMES)}")
        if packed != 3 * width:
            raise _unsupported(self.base, f"have an attention width of {packed // 3}, not {width}")
        return BlockSettings(
            width=width,
            heads=self.config["num_attention_heads"],
            hidden=hidden,
            activation=_ACTIVATION_NAMES[activation],  # type: ignore[arg-type]
            norm_position="post" if self.family.post_norm else "pre",
            eps=self.config["layer_norm_eps"],
            layer_scale=1.0 if self.family.layer_scales else None,  # initial value, overwritten by the weights
        ).model_dump()


def _configuration(net: nn.Module) -> dict[str, Any]:
    """The configuration in the terms of ``transformers``; of a truncated tower, with the number of blocks left."""
    if isinstance(net, BertEncoder | Dinov2Encoder):
        depth = len(net.encoder.layer)
        return {**asdict(net.settings), "num_hidden_layers": depth, "hidden_act": "gelu", "is_decoder": False}
    assert is_transformers_model(net), "only transformers models have these names"
    return net.config.to_dict()


def _weight_and_bias(path: str, native: str, source: _ForeignWeights) -> dict[str, Tensor]:
    return {f"{native}.{leaf}": source.take(f"{path}.{leaf}") for leaf in _WEIGHT_AND_BIAS}


def _to_native_image(base: Backbone, source: _ForeignWeights) -> ImageTransformer:
    if source.config.get("use_swiglu_ffn"):
        raise _unsupported(base, _GATED)
    blocks = source.blocks()
    kernel, bias = (source.take(f"embeddings.patch_embeddings.projection.{leaf}") for leaf in _WEIGHT_AND_BIAS)
    positions = source.take("embeddings.position_embeddings")
    patch, grid = kernel.shape[-1], math.isqrt(positions.shape[1] - 1)
    if tuple(kernel.shape[1:]) != (3, patch, patch) or grid * grid != positions.shape[1] - 1:
        raise _unsupported(
            base, f"follow patches of shape {tuple(kernel.shape[1:])} with {positions.shape[1]} positions"
        )
    size = _image_size(base, source)
    if size % patch:
        near = max(patch, round(size / patch) * patch)
        raise UserError(f"size = {size}: {base.name} cuts images into {patch} px patches; take {near}")
    settings = ImageTransformerSettings(
        **source.block_settings(blocks), size=size, patch=patch, layers=source.block_count()
    )
    tensors = {
        **blocks,
        "cls_token": source.take("embeddings.cls_token"),
        "pos_embed": resize_pos_embed(positions, size // patch, 1),
        "patch_embed.proj.weight": kernel,
        "patch_embed.proj.bias": bias,
        **_weight_and_bias("layernorm", "norm", source),
    }
    with torch.device("meta"):
        net = ImageTransformer(settings)
    return _load_weights(net, tensors)


def _image_size(base: Backbone, source: _ForeignWeights) -> int:
    if base.transform is not None:
        return base.transform.size
    size = source.config["image_size"]
    return size if isinstance(size, int) else size[0]


def _to_native_text(base: Backbone, source: _ForeignWeights) -> TextTransformer:
    if source.config["is_decoder"]:
        raise _unsupported(base, "are those of a decoder")
    blocks = source.blocks()
    tokens, positions = (source.take(f"embeddings.{kind}_embeddings.weight") for kind in ("word", "position"))
    positions = positions[_first_position(base.net) :]
    types = source.take_optional("embeddings.token_type_embeddings.weight")
    if types is not None:  # all text of a tower has token type 0
        positions = positions + types[0]
    settings = TextTransformerSettings(
        **source.block_settings(blocks),
        vocabulary=len(tokens),
        context=len(positions),
        layers=source.block_count(),
        attention="bidirectional",
        entry_norm=True,
    )
    tensors = {
        **blocks,
        "token_embed.weight": tokens,
        "pos_embed": positions[None],
        **_weight_and_bias("embeddings.LayerNorm", "norm_pre", source),
    }
    with torch.device("meta"):
        net = TextTransformer(settings)
    return _load_weights(net, tensors)


def _first_position(net: nn.Module) -> int:
    """The position row of the first token: RoBERTa models count positions from the padding id on."""
    table = net.get_submodule("embeddings.position_embeddings")
    assert isinstance(table, nn.Embedding)
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _load_weights(net: Any, tensors: Mapping[str, Tensor]) -> Any:
    net.load_state_dict(dict(tensors), assign=True)
    return net


def _unsupported(base: Backbone, reason: str) -> UserError:
    return UserError(
        f"tower = {base.name!r}: the blocks of {type(base.net).__name__} {reason}; clasp converts "
        f"{', '.join(WEIGHT_MAPPINGS)}"
    )


_BERT = WeightMapping(
    blocks="encoder.layer.{}",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    parts={
        "attn.proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm2": "output.LayerNorm",
    },
    read=_to_native_text,
    post_norm=True,
)
_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_MLP = {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}

_DINOV2 = WeightMapping(
    blocks="encoder.layer.{}",
    qkv=_QKV,
    parts={**_MLP, "norm1": "norm1", "norm2": "norm2"},
    read=_to_native_image,
    layer_scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)

WEIGHT_MAPPINGS: dict[str, WeightMapping] = {
    "ViTModel": WeightMapping(  # DeiT without distillation too
        blocks="layers.{}",
        qkv=_QKV,
        parts={**_MLP, "norm1": "layernorm_before", "norm2": "layernorm_after"},
        read=_to_native_image,
    ),
    **dict.fromkeys(("Dinov2Model", "Dinov2Encoder"), _DINOV2),
    **dict.fromkeys(("BertModel", "BertEncoder", "RobertaModel", "XLMRobertaModel", "CamembertModel"), _BERT),
}
_ROTARY, _GATED = "have rotary positions", "have a gated feed-forward"
# reasons why other families are not supported
_UNSUPPORTED = {
    **dict.fromkeys(("EfficientNet", "EfficientNetModel", "ConvNextModel", "ConvNeXt"), "are convolutional"),
    **dict.fromkeys(("BeitModel", "MPNetModel", "T5EncoderModel", "MT5EncoderModel"), "have relative positions"),
    **dict.fromkeys(("DINOv3ViTModel", "ModernBertModel"), _ROTARY),
    **dict.fromkeys(
        ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "GemmaModel"), f"{_ROTARY} and {_GATED}"
    ),
    "DeiTModel": "have a distillation token beside the class token",
}
