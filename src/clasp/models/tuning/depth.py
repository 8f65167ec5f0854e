"""The depth of a net: append blocks after the last one, or truncate it to the first few.

Input: a net, which is modified in place. Output: the names of the new parameters, where blocks are appended. Note:
``transformers`` models read their depth from their configuration in the forward pass, so it is updated, too.
"""

from __future__ import annotations

import copy

from torch import nn

from clasp.errors import counted
from clasp.models.structure import ModelStructure, find_structure, is_bias, is_norm, is_transformers_model
from clasp.models.transformer.dinov2 import Dinov2Encoder
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.types import UserError

DEEP_INITS = ("copy", "random")


def append_blocks(net: nn.Module, structure: ModelStructure, count: int, init: str) -> set[str]:
    """Append ``count`` blocks after the last one: copies of it, or randomly initialised ones (LilT's deep adapter).

    LilT initialises them at random; copies leave the hidden states close to the input that the final norm and the
    pooling were trained on. Returns the names of the new blocks' parameters. Raises ``UserError`` where the blocks are
    in no ``ModuleList`` or ``Sequential``, and where the last one changes the width of its input.
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
    """Keep the first ``layer`` blocks (negative: from the end); the modules after the last block are kept.

    Raises ``UserError`` when the net has fewer blocks, or when their widths differ.
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
        blocks = counted(len(parts.blocks), "block")
        raise UserError(f"layer = {layer}: {parts.family} has {blocks}; choose 1 to {len(parts.blocks)}")
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
    """Initial layer scale: from the net's settings, else 1e-4, as in DeiT-III, LilT's large tower."""
    if isinstance(net, ImageTransformer | TextTransformer):
        configured = net.settings.layer_scale
    elif isinstance(net, Dinov2Encoder):
        configured = net.settings.layerscale_value
    else:
        configured = net.config.to_dict().get("layerscale_value") if is_transformers_model(net) else None
    return 1e-4 if configured is None else configured


def _reinitialize_block(block: nn.Module, layer_scale: float) -> None:
    """Linear, convolution and embedding weights N(0, 0.02), biases zero, norms one: the initialisation of BERT and ViT.

    Vectors that are neither a bias nor of a norm are layer scales, and are initialised to ``layer_scale``.
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
    """Set the depth in the configuration of a ``transformers`` model, which its forward pass reads."""
    if not is_transformers_model(net):
        return
    config = net.config.to_dict()
    if "num_hidden_layers" in {*config, *net.config.attribute_map}:
        net.config.num_hidden_layers = blocks
    kinds = config.get("layer_types")
    if kinds:
        net.config.layer_types = (kinds + kinds[-1:] * blocks)[:blocks]
