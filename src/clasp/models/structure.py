"""Where the blocks, norms and branches of any model are.

In goes a foreign module, out comes an ``ModelStructure``: its blocks in order, the attention and MLP parts of each
block, the places where a branch begins and ends, and what follows the last block. Families we know are rows of
``FAMILY_LAYOUTS``, keyed by the name of the class; any other model is read by its structure, and what was looked for is
said when that fails. Norms are told by what they are (a leaf of a type named a norm, whose parameters are all vectors),
never by the name they have in their parent: RMSNorm and a norm called ``ln_3`` are found, and a layer scale is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from clasp.models.transformer.blocks import Block as OurBlock
from clasp.types import UserError


@dataclass(frozen=True, slots=True)
class FamilyLayout:
    """Where a family keeps its parts. Paths are dotted; ``*`` stands for one index.

    ``branch_inputs`` and ``branch_outputs`` name, for each residual branch of a block, the module whose input is the
    branch's input and the module whose output is the branch's output (before the residual sum).
    """

    blocks: str
    attention: str | None
    mlp: tuple[str, ...]
    branch_inputs: tuple[str, ...]
    branch_outputs: tuple[str, ...]
    tail: tuple[str, ...] = ()
    """what follows the last block: the final norm; trained together with the last blocks"""
    pooled_norm: str | None = None
    """a norm that the family applies to the pooled vector, not to the states"""
    unused: tuple[str, ...] = ()
    """parameters and modules that never take part in encoding; dropped when a tower is built"""
    channels_first: bool = False
    """branches carry ``B D height width`` maps"""
    laterals: str | None = None
    """modules that bring something from outside into the states; ``*`` is the number of the block it stands before"""


def _vit(**changes) -> FamilyLayout:
    return FamilyLayout(
        blocks="layers.*",
        attention="attention",
        mlp=("mlp",),
        branch_inputs=("layernorm_before", "layernorm_after"),
        branch_outputs=("attention.o_proj", "mlp.fc2"),
        **{"tail": ("layernorm",), "unused": ("pooler",), **changes},
    )


def _dino(blocks: str, norm: str) -> FamilyLayout:
    return FamilyLayout(
        blocks=blocks,
        attention="attention",
        mlp=("mlp",),
        branch_inputs=("norm1", "norm2"),
        branch_outputs=("layer_scale1", "layer_scale2"),
        tail=(norm,),
        unused=("embeddings.mask_token",),
    )


def _clip(tail: str, **changes) -> FamilyLayout:
    return FamilyLayout(
        blocks="encoder.layers.*",
        attention="self_attn",
        mlp=("mlp",),
        branch_inputs=("layer_norm1", "layer_norm2"),
        branch_outputs=("self_attn.out_proj", "mlp.fc2"),
        tail=(tail,),
        **changes,
    )


_BERT = FamilyLayout(
    blocks="encoder.layer.*",
    attention="attention",
    mlp=("intermediate", "output"),
    branch_inputs=("attention.self", "intermediate"),
    branch_outputs=("attention.output.dropout", "output.dropout"),
    unused=("pooler",),
)
_LLAMA = FamilyLayout(
    blocks="layers.*",
    attention="self_attn",
    mlp=("mlp",),
    branch_inputs=("input_layernorm", "post_attention_layernorm"),
    branch_outputs=("self_attn.o_proj", "mlp.down_proj"),
    tail=("norm",),
)
_TIMM_VIT = FamilyLayout(
    blocks="blocks.*",
    attention="attn",
    mlp=("mlp",),
    branch_inputs=("norm1", "norm2"),
    branch_outputs=("attn.proj", "mlp.fc2"),
    tail=("norm",),
    pooled_norm="fc_norm",
    unused=("head",),
)
_NATIVE_VIT = replace(_TIMM_VIT, laterals="parallel.laterals.*")  # nn.nets, which keeps timm's names

FAMILY_LAYOUTS: dict[str, FamilyLayout] = {
    "ViTModel": _vit(),
    "DeiTModel": _vit(),
    "BeitModel": _vit(unused=(), pooled_norm="pooler.layernorm"),
    "Dinov2Model": _dino("encoder.layer.*", "layernorm"),
    "DINOv3ViTModel": _dino("model.layer.*", "norm"),
    "CLIPVisionModel": _clip("post_layernorm", pooled_norm="post_layernorm"),
    "CLIPTextModel": _clip("final_layer_norm"),
    "SiglipVisionModel": _clip("post_layernorm", unused=("head",)),
    "SiglipTextModel": _clip("final_layer_norm", unused=("head",)),
    "ConvNextModel": FamilyLayout(
        blocks="encoder.stages.*.layers.*",
        attention=None,
        mlp=("pwconv1", "pwconv2"),
        branch_inputs=("dwconv",),
        branch_outputs=("pwconv2",),
        pooled_norm="layernorm",
    ),
    "EfficientNetModel": FamilyLayout(
        blocks="encoder.blocks.*",
        attention=None,
        mlp=(),
        branch_inputs=(),
        branch_outputs=("projection.project_bn",),
        tail=("encoder.top_conv", "encoder.top_bn"),
        channels_first=True,
    ),
    "EfficientNet": FamilyLayout(  # efficientnet_lite_pytorch
        blocks="_blocks.*",
        attention=None,
        mlp=(),
        branch_inputs=(),
        branch_outputs=("_bn2",),
        tail=("_conv_head", "_bn1"),
        unused=("_fc",),
        channels_first=True,
    ),
    "VisionTransformer": _NATIVE_VIT,  # timm's, and our DeiT
    "ImageTransformer": _NATIVE_VIT,
    "TextTransformer": _NATIVE_VIT,
    "Eva": _TIMM_VIT,
    "Beit": _TIMM_VIT,
    "ConvNeXt": FamilyLayout(  # timm's
        blocks="stages.*.blocks.*",
        attention=None,
        mlp=("mlp",),
        branch_inputs=("conv_dw",),
        branch_outputs=("mlp",),
        pooled_norm="head.norm",
    ),
    "BertModel": _BERT,
    "RobertaModel": _BERT,
    "XLMRobertaModel": _BERT,
    "ElectraModel": _BERT,
    "CamembertModel": _BERT,
    "MPNetModel": FamilyLayout(
        blocks="encoder.layer.*",
        attention="attention",
        mlp=("intermediate", "output"),
        branch_inputs=("attention.attn", "intermediate"),
        branch_outputs=("attention.attn.o", "output.dropout"),
        unused=("pooler",),
    ),
    "DistilBertModel": FamilyLayout(
        blocks="transformer.layer.*",
        attention="attention",
        mlp=("ffn",),
        branch_inputs=("attention", "ffn"),
        branch_outputs=("attention.out_lin", "ffn"),
    ),
    "ModernBertModel": FamilyLayout(
        blocks="layers.*",
        attention="attn",
        mlp=("mlp",),
        branch_inputs=("attn_norm", "mlp_norm"),
        branch_outputs=("attn.Wo", "mlp.Wo"),
        tail=("final_norm",),
    ),
    "T5EncoderModel": FamilyLayout(
        blocks="encoder.block.*",
        attention="layer.0.SelfAttention",
        mlp=("layer.1.DenseReluDense",),
        branch_inputs=("layer.0.layer_norm", "layer.1.layer_norm"),
        branch_outputs=("layer.0.dropout", "layer.1.dropout"),
        tail=("encoder.final_layer_norm",),
    ),
    "LlamaModel": _LLAMA,
    "MistralModel": _LLAMA,
    "Qwen2Model": _LLAMA,
    "Qwen3Model": _LLAMA,
    "GemmaModel": _LLAMA,
}


@dataclass(frozen=True, slots=True)
class BlockStructure:
    """One block: its dotted path in the net and the paths of its parts."""

    path: str
    attention: str | None
    mlp: tuple[str, ...]
    branch_inputs: tuple[str, ...]
    branch_outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """A net laid open. All paths are dotted and relative to the net."""

    family: str
    blocks: tuple[BlockStructure, ...]
    tail: tuple[str, ...]
    pooled_norm: str | None
    prefix_tokens: int
    channels_first: bool
    min_prefix_blocks: int
    """the fewest blocks below a cut: those above it must need nothing but the states"""


def find_structure(net: nn.Module) -> ModelStructure:
    """Read the anatomy of ``net``: by its family where we know it, by its structure elsewhere.

    Raises ``UserError`` that says what was looked for when no stack of blocks is found.
    """
    family = type(net).__name__
    modules = dict(net.named_modules())
    layout = _family_layout(net, modules) or _layout_by_structure(net)
    blocks = tuple(
        BlockStructure(
            path=path,
            attention=f"{path}.{layout.attention}" if layout.attention else None,
            mlp=_existing_paths(modules, path, layout.mlp),
            branch_inputs=_existing_paths(modules, path, layout.branch_inputs),
            branch_outputs=_existing_paths(modules, path, layout.branch_outputs),
        )
        for path in _matching_paths(modules, layout.blocks)
    )
    pooled_norm = layout.pooled_norm if layout.pooled_norm in modules else None
    tail = tuple(path for path in dict.fromkeys((*layout.tail, pooled_norm)) if path in modules)
    lateral_layers = (
        [int(path.rpartition(".")[2]) for path in _matching_paths(modules, layout.laterals)] if layout.laterals else []
    )
    lowest_cut = 1 + max(lateral_layers, default=0)
    return ModelStructure(family, blocks, tail, pooled_norm, _prefix_tokens(net), layout.channels_first, lowest_cut)


def find_unused_modules(net: nn.Module) -> tuple[str, ...]:
    """Paths of parameters and modules of ``net`` that never take part in encoding."""
    layout = _family_layout(net, dict(net.named_modules()))
    return layout.unused if layout else ()


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with weights: a leaf whose parameters are vectors, of a type named a norm."""
    parameters = list(module.parameters(recurse=False))
    leaf = next(module.children(), None) is None
    return (
        leaf and bool(parameters) and "norm" in type(module).__name__.lower() and all(p.ndim == 1 for p in parameters)
    )


def is_bias(name: str, ndim: int) -> bool:
    """Whether a parameter is an additive bias, by the last part of its name: not a ``relative_position_bias_table``."""
    leaf = name.rpartition(".")[2]
    return ndim == 1 and (leaf == "bias" or leaf.endswith("_bias"))


def _matching_paths(modules: dict[str, nn.Module], pattern: str) -> Iterator[str]:
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"\Z")
    return (name for name in modules if expression.match(name))


def _existing_paths(modules: dict[str, nn.Module], block: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block}.{part}" for part in parts if f"{block}.{part}" in modules)


def _family_layout(net: nn.Module, modules: dict[str, nn.Module]) -> FamilyLayout | None:
    """The row of the net's class; none where another library's class has the same name and other insides."""
    layout = FAMILY_LAYOUTS.get(type(net).__name__)
    first = next(_matching_paths(modules, layout.blocks), None) if layout else None
    if layout is None or first is None:
        return None
    block = modules[first]
    if isinstance(block, OurBlock) and block.norm_position == "post":  # its norms end the branches instead
        return replace(layout, branch_inputs=("attn", "mlp"))
    return layout


# CLIP's class token is a vector, all others are [1, tokens, D]
_PREFIX_TOKENS = ("cls_token", "class_embedding", "dist_token", "distillation_token", "register_tokens", "reg_token")


def _prefix_tokens(net: nn.Module) -> int:
    """Tokens before the first patch (class, distillation, registers), counted in the parameters that hold them."""
    tokens = (p for name, p in net.named_parameters() if name.rpartition(".")[2] in _PREFIX_TOKENS)
    return sum(p.shape[1] if p.ndim == 3 else 1 for p in tokens)


def _layout_by_structure(net: nn.Module) -> FamilyLayout:
    """The stack of like modules that holds the most parameters is the blocks; parts are told by their types' names."""
    stacks: list[tuple[int, str, nn.Module]] = []
    for name, module in net.named_modules():
        children = list(module.children())
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(children) >= 2:
            alike = len({type(child) for child in children}) == 1
            size = sum(p.numel() for p in module.parameters())
            if alike and next(children[0].children(), None) is not None:
                stacks.append((size, name, children[0]))
    if not stacks:
        raise UserError(
            f"{type(net).__name__}: no blocks found; looked for a ModuleList or Sequential of two or more modules of "
            f"one type that have parts of their own. Families known by name: {', '.join(sorted(FAMILY_LAYOUTS))}"
        )
    _, path, block = max(stacks, key=lambda stack: stack[0])

    def part(*words: str) -> str | None:
        return next(
            (
                n
                for n, m in block.named_children()
                if any(w in n.lower() or w in type(m).__name__.lower() for w in words)
            ),
            None,
        )

    attention, mlp = part("attn", "attention"), part("mlp", "ffn", "feedforward", "feed_forward")
    top = [name for name, _ in net.named_children()]
    container = path.split(".")[0]
    return FamilyLayout(
        blocks=f"{path}.*" if path else "*",
        attention=attention,
        mlp=(mlp,) if mlp else (),
        branch_inputs=(),
        branch_outputs=tuple(p for p in (attention, mlp) if p),
        tail=tuple(name for name in top[top.index(container) + 1 :] if is_norm(net.get_submodule(name))),
    )
