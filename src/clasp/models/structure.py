"""The blocks, norms and residual branches of any model.

Input: a foreign module. Output: a ``ModelStructure``: its blocks in order, the attention and MLP parts of each block,
the inputs and outputs of the residual branches, and the modules after the last block. Known families are rows of
``FAMILY_LAYOUTS``, keyed by class name; the blocks of other models are found by structure. Note: norms are identified
by type (a leaf of a type named a norm, whose parameters are all vectors), not by their attribute name: RMSNorm and a
norm called ``ln_3`` are norms, and a layer scale is not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

from clasp.models.family_layouts import BERT_LAYOUT, FAMILY_LAYOUTS, FamilyLayout
from clasp.models.transformer.blocks import Block as OurBlock
from clasp.models.transformer.encoders import TextTransformer
from clasp.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    """The parts of a net. All paths are dotted and relative to the net."""

    family: str
    blocks: tuple[BlockStructure, ...]
    tail: tuple[str, ...]
    pooled_norm: str | None
    class_token: bool
    """whether the first token is one: not where there are registers only"""
    prefix_tokens: int
    channels_first: bool
    min_prefix_blocks: int
    """the least depth of a frozen prefix: the blocks above it have no input but the hidden states"""


def find_structure(net: nn.Module) -> ModelStructure:
    """The structure of ``net``: from its row in ``FAMILY_LAYOUTS``, else from its module tree.

    Raises ``UserError`` that describes the modules searched for when no stack of blocks is found.
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
    min_blocks = 1 + max(lateral_layers, default=0)
    class_token, prefix = _count_tokens(net, _CLASS_TOKENS) > 0, _count_tokens(net, _PREFIX_TOKENS)
    return ModelStructure(family, blocks, tail, pooled_norm, class_token, prefix, layout.channels_first, min_blocks)


def find_unused_modules(net: nn.Module) -> tuple[str, ...]:
    """Paths of the parameters and modules of ``net`` that its output does not depend on."""
    modules = dict(net.named_modules())
    layout = _family_layout(net, modules)
    unused = layout.unused if layout else ()
    return tuple(path for part in unused for path in (_matching_paths(modules, part) if "*" in part else (part,)))


def is_transformers_model(net: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether ``net`` is a model of ``transformers``, which is not imported for the answer: without it, none is."""
    if "transformers.modeling_utils" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(net, PreTrainedModel)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer with weights: a leaf of a type named a norm, all parameters vectors."""
    parameters = list(module.parameters(recurse=False))
    leaf = next(module.children(), None) is None
    return (
        leaf and bool(parameters) and "norm" in type(module).__name__.lower() and all(p.ndim == 1 for p in parameters)
    )


def is_bias(name: str, ndim: int) -> bool:
    """Whether a parameter is an additive bias, by the end of its name; a ``relative_position_bias_table`` is not."""
    leaf = name.rpartition(".")[2]
    return ndim == 1 and (leaf == "bias" or leaf.endswith("_bias"))


def learned_positions(net: nn.Module) -> int | None:
    """The rows of a text net's learned position embedding, in tokens; ``None`` where positions are not learned."""
    rows = [
        # RoBERTa-like models number positions from the padding id + 1
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in net.named_modules()
        if isinstance(table, nn.Embedding) and ("position" in name.rpartition(".")[2] or name == "wpe")
    ]
    if isinstance(net, TextTransformer):
        rows.append(net.settings.context)
    return min(rows, default=None)


def _matching_paths(modules: dict[str, nn.Module], pattern: str) -> Iterator[str]:
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"\Z")
    return (name for name in modules if expression.match(name))


def _existing_paths(modules: dict[str, nn.Module], block: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block}.{part}" for part in parts if f"{block}.{part}" in modules)


def _family_layout(net: nn.Module, modules: dict[str, nn.Module]) -> FamilyLayout | None:
    """The row of the net's class; ``None`` where a class of another library has the same name and other modules."""
    layout = FAMILY_LAYOUTS.get(type(net).__name__)
    first = next(_matching_paths(modules, layout.blocks), None) if layout else None
    if layout is None or first is None:
        return None
    block = modules[first]
    if isinstance(block, OurBlock) and block.norm_position == "post":  # norms are at the end of the branches
        return replace(layout, branch_inputs=("attn", "mlp"))
    return layout


_CLASS_TOKENS = ("cls_token", "class_embedding")
# CLIP's class token is a vector, all others are [1, tokens, D]
_PREFIX_TOKENS = (*_CLASS_TOKENS, "dist_token", "distillation_token", "register_tokens", "reg_token")


def _count_tokens(net: nn.Module, names: tuple[str, ...]) -> int:
    """Number of tokens before the first patch that are parameters of these names."""
    tokens = (
        p
        for name, p in net.named_parameters()
        if name.rpartition(".")[2] in names and not name.startswith("head.")  # AIMv2's is a pooling token
    )
    return sum(p.shape[1] if p.ndim == 3 else 1 for p in tokens)


def _layout_by_structure(net: nn.Module) -> FamilyLayout:
    """Blocks: the stack of modules of one type with the most parameters; their parts are found by name and type."""
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

    attention, mlp, branch_outputs = _parts_by_name(block)
    top = [name for name, _ in net.named_children()]
    container = path.split(".")[0]
    return FamilyLayout(
        blocks=f"{path}.*" if path else "*",
        attention=attention,
        mlp=mlp,
        branch_inputs=(),
        branch_outputs=branch_outputs,
        tail=tuple(name for name in top[top.index(container) + 1 :] if is_norm(net.get_submodule(name))),
    )


def _parts_by_name(block: nn.Module) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """Attention, MLP and branch outputs of a block, found by the names of children that have weight matrices.

    Children without any are left out: a norm or a dropout may be named after the part that it follows.
    """
    modules = dict(block.named_modules())
    if modules.keys() >= {*BERT_LAYOUT.branch_outputs, *BERT_LAYOUT.branch_inputs}:
        return BERT_LAYOUT.attention, BERT_LAYOUT.mlp, BERT_LAYOUT.branch_outputs
    parts = [(n, m) for n, m in block.named_children() if any(p.ndim >= 2 for p in m.parameters())]

    def part(*keywords: str) -> str | None:
        named = (n for n, m in parts if any(k in n.lower() or k in type(m).__name__.lower() for k in keywords))
        return next(named, None)

    attention, mlp = part("attn", "attention"), part("mlp", "ffn", "feedforward", "feed_forward")
    if mlp is not None and mlp != attention:
        return attention, (mlp,), tuple(p for p in (attention, mlp) if p)
    pair = next((pair for pair in _MLP_PAIRS if {*pair} <= {n for n, _ in parts}), ())
    return attention, pair, tuple(p for p in (attention, *pair[-1:]) if p)


# the two linear layers of an MLP that are direct children of the block (OPT, torch's TransformerEncoderLayer)
_MLP_PAIRS = (("fc1", "fc2"), ("linear1", "linear2"), ("intermediate", "output"))
