"""Captures activations of a native encoder during a forward pass: hidden states at MS-CLIP's probe points, attention
maps.

Input: an encoder and a callable that runs it once. Output: its hidden states by layer, or its attention weights. Layers
are counted from 0 as in the sharing policy, a stem being layer 0. Note: the encoders contain no code for this. Forward
hooks are registered only while the callable runs, and attention maps are recomputed beside the attention, which does
not store them (``Attention.attention_weights``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clasp.models.transformer.blocks import Attention, Block
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.types import UserError

_ForwardCall = Callable[[], Any]
NATIVE_ENCODERS = ImageTransformer | TextTransformer
"""The encoders that can be probed"""


@dataclass(frozen=True, slots=True)
class Activations:
    """Hidden states ``[B N D]`` of every token of one forward pass, padding and prompts included, by layer.

    ``norm1`` and ``norm2`` are the outputs of these norms, ``attention`` that of the attention before layer scale and
    residual sum; modules inserted by tuning are included. ``final`` is the output of the encoder, after the final norm
    if any. In pre-norm blocks ``norm1`` reads the block's input and ``norm2`` the sum with the attention; in post-norm
    blocks ``norm1`` reads the sum with the attention and ``norm2`` the sum with the feed-forward part.
    """

    norm1: dict[int, Float[Tensor, "B N D"]]
    attention: dict[int, Float[Tensor, "B N D"]]
    norm2: dict[int, Float[Tensor, "B N D"]]
    final: Float[Tensor, "B N D"]


def capture_activations(net: nn.Module, forward: _ForwardCall) -> Activations:
    """The hidden states of ``net`` while ``forward`` runs it; not detached from the autograd graph.

    Layers that ``forward`` skips, as after a cached frozen prefix, are missing. A tower runs its encoder once for
    ``tower(inputs)``, once per length bucket for ``tower.pooled`` of captions, and once more at the first access of
    ``frozen_blocks``. Raises ``UserError`` for an encoder that is not native.
    """
    found: dict[tuple[str, int], list[Tensor]] = {}

    def recorder(point: str, layer: int) -> Callable[..., None]:
        return lambda module, args, output: found.setdefault((point, layer), []).append(output)

    handles = []
    for layer, block in _blocks(net).items():
        for point, part in (("norm1", block.norm1), ("attention", block.attn), ("norm2", block.norm2)):
            handles.append(part.register_forward_hook(recorder(point, layer)))
    handles.append(net.get_submodule("norm").register_forward_hook(recorder("final", 0)))
    with _removing_hooks(handles):
        forward()
    once = _single_calls(found)

    def by_layer(point: str) -> dict[int, Tensor]:
        return {layer: states for (name, layer), states in once.items() if name == point}

    return Activations(by_layer("norm1"), by_layer("attention"), by_layer("norm2"), once["final", 0])


def attention_maps(net: nn.Module, forward: _ForwardCall) -> dict[int, Float[Tensor, "B H N N"]]:
    """The attention weights by layer, queries (rows, which sum to 1) by keys, while ``forward`` runs.

    Memory is quadratic in the number of tokens, and queries and keys are multiplied a second time. Raises ``UserError``
    for an encoder that is not native.
    """
    found: dict[tuple[str, int], list[Tensor]] = {}

    def map_recorder(layer: int) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, Attention)
            found.setdefault(("map", layer), []).append(module.attention_weights(*args))

        return before

    with _removing_hooks([block.attn.register_forward_pre_hook(map_recorder(n)) for n, block in _blocks(net).items()]):
        forward()
    return {layer: maps for (_, layer), maps in _single_calls(found).items()}


# --- how -------------------------------------------------------------------------------------------------------------


def _blocks(net: nn.Module) -> dict[int, Block]:
    if not isinstance(net, NATIVE_ENCODERS):
        raise UserError(
            f"{type(net).__name__} is not a native encoder, and only those can be probed; "
            "clasp.models.zoo.to_native.to_native converts a ViT, a DINOv2 or a BERT"
        )
    first = net.settings.first_layer if isinstance(net, ImageTransformer) else 0
    found: dict[int, Block] = {}
    for layer, block in enumerate(net.blocks, first):
        assert isinstance(block, Block)
        found[layer] = block
    return found


def _single_calls(found: dict[tuple[str, int], list[Tensor]]) -> dict[tuple[str, int], Tensor]:
    runs = {len(outputs) for outputs in found.values()}
    assert runs == {1}, f"forward must run the net once, not {max(runs, default=0)} times"
    return {point: outputs[0] for point, outputs in found.items()}


@contextmanager
def _removing_hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
