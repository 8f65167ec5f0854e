"""How many blocks a net has: append some above the last, or keep the first few.

In goes a net, which is changed in place; appended blocks say which parameters are new. Unusual: ``transformers`` models
read their depth from their configuration while they run, so it is told.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

from clasp.models.structure import ModelStructure, find_structure, is_bias, is_norm
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEEP_INITS = ("copy", "random")


def append_blocks(net: nn.Module, structure: ModelStructure, count: int, init: str) -> set[str]:
    """Append ``count`` blocks above the last one: copies of it, or fresh ones of the same shape (LilT's deep adapter).

    The paper starts them at random; a copy keeps the states near what the final norm and the pooling expect. Returns
    the names of the new blocks' parameters. Raises ``UserError`` for a net above whose last block none can stand.
    """
    last = structure.blocks[-1].path
    container_path, _, index = last.rpartition(".")
    container, block = net.get_submodule(container_path), net.get_submodule(last)
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        raise UserError(
            f"deep: {structure.family} keeps its blocks in a {type(container).__name__}; a block cannot be appended"
        )
    if not _preserves_shape(block):
        raise UserError(
            f"deep: the last block of {structure.family} changes the width of its input, so a copy cannot "
            "stand above it; use last(n) or adapters instead"
        )
    names: set[str] = set()
    for number in range(int(index) + 1, int(index) + 1 + count):
        new = copy.deepcopy(block)
        if init == "random":
            _reinitialize_block(new, _initial_layer_scale(net))
        container.append(new)
        names |= {f"{container_path}.{number}.{name}" for name, _ in new.named_parameters()}
    _update_config_depth(net, len(container))
    return names


def truncate_blocks(net: nn.Module, layer: int) -> None:
    """Keep the first ``layer`` blocks (negative counts from the end); what follows the last block stays.

    Raises ``UserError`` when there are not so many blocks, or when their widths differ.
    """
    parts = find_structure(net)
    container_path = parts.blocks[-1].path.rpartition(".")[0]
    container = net.get_submodule(container_path)
    keep = layer if layer > 0 else len(parts.blocks) + layer
    stack = container if isinstance(container, nn.ModuleList | nn.Sequential) else None
    if stack is None or len(stack) != len(parts.blocks) or parts.channels_first:
        raise UserError(
            f"layer = {layer}: {parts.family} changes width from block to block; only its last layer can be read"
        )
    if not 1 <= keep <= len(parts.blocks):
        raise UserError(
            f"layer = {layer}: {parts.family} has {len(parts.blocks)} blocks; choose 1 to {len(parts.blocks)}"
        )
    if isinstance(net, ImageTransformer) and net.parallel is not None and max(net.parallel.stage_by_block) >= keep:
        raise UserError(f"layer = {layer}: the parallel branch joins above that; choose {len(parts.blocks)}")
    del stack[keep:]
    _update_config_depth(net, keep)


# --- how -------------------------------------------------------------------------------------------------------------


def _preserves_shape(block: nn.Module) -> bool:
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions or any(isinstance(m, nn.Linear) for m in block.modules()):
        return True
    strides = all(m.stride in (1, (1, 1)) for m in convolutions)
    return strides and convolutions[0].in_channels == convolutions[-1].out_channels


def _initial_layer_scale(net: nn.Module) -> float:
    """What a layer scale starts from: what the family's settings say, else what LilT's large tower does (DeiT-III)."""
    if isinstance(net, ImageTransformer | TextTransformer):
        said = net.settings.layer_scale
    else:
        said = net.config.to_dict().get("layerscale_value") if _is_transformers_model(net) else None
    return 1e-4 if said is None else said


def _reinitialize_block(block: nn.Module, layer_scale: float) -> None:
    """Linear, convolution and embedding weights N(0, 0.02), biases zero, norms one: BERT's and ViT's own start.

    Vectors that are neither bias nor of a norm scale a branch, and start from ``layer_scale``.
    """
    for module in block.modules():
        if is_norm(module):
            for name, p in module.named_parameters(recurse=False):
                nn.init.zeros_(p) if name == "bias" else nn.init.ones_(p)
        else:
            for name, p in module.named_parameters(recurse=False):
                if p.ndim >= 2:
                    nn.init.trunc_normal_(p, std=0.02)
                elif is_bias(name, p.ndim):
                    nn.init.zeros_(p)
                elif p.ndim == 1:
                    nn.init.constant_(p, layer_scale)


def _update_config_depth(net: nn.Module, blocks: int) -> None:
    """``transformers`` models read their depth from their configuration while running."""
    if not _is_transformers_model(net):
        return
    config = net.config.to_dict()
    if "num_hidden_layers" in {*config, *net.config.attribute_map}:
        net.config.num_hidden_layers = blocks
    kinds = config.get("layer_types")
    if kinds:
        net.config.layer_types = (kinds + kinds[-1:] * blocks)[:blocks]


def _is_transformers_model(net: nn.Module) -> TypeGuard[PreTrainedModel]:
    from transformers import PreTrainedModel

    return isinstance(net, PreTrainedModel)
