"""Captures the attention maps of a native encoder during a forward pass.

Input: an encoder and a callable that runs it once. Output: its attention weights by layer, counted from 0 as in the
sharing policy, a stem being layer 0. Note: the encoders contain no code for this. Forward hooks are registered only
while the callable runs, and maps are recomputed beside the attention, which does not store them
(``Attention.attention_weights``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clasp.models.transformer.blocks import Attention, Block
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.types import UserError

NATIVE_ENCODERS = ImageTransformer | TextTransformer
"""The encoders whose attention can be read"""


def attention_maps(net: nn.Module, forward: Callable[[], Any]) -> dict[int, Float[Tensor, "B H N N"]]:
    """The attention weights by layer, queries (rows, which sum to 1) by keys, while ``forward`` runs.

    Prompts and padding are included. Layers that ``forward`` skips, as after a cached frozen prefix, are missing. A
    tower runs its encoder once for ``tower(inputs)``, once per length bucket for ``tower.pooled`` of captions, and once
    more at the first access of ``frozen_blocks``. Memory is quadratic in the number of tokens, and queries and keys are
    multiplied a second time. Raises ``UserError`` for an encoder that is not native.
    """
    found: dict[int, list[Tensor]] = {}

    def recorder(layer: int) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, Attention)
            found.setdefault(layer, []).append(module.attention_weights(*args))

        return before

    with _removing_hooks([block.attn.register_forward_pre_hook(recorder(n)) for n, block in _blocks(net).items()]):
        forward()
    runs = {len(maps) for maps in found.values()}
    assert runs == {1}, f"forward must run the net once, not {max(runs, default=0)} times"
    return {layer: maps[0] for layer, maps in found.items()}


# --- how -------------------------------------------------------------------------------------------------------------


def _blocks(net: nn.Module) -> dict[int, Block]:
    if not isinstance(net, NATIVE_ENCODERS):
        raise UserError(
            f"{type(net).__name__} is not a native encoder, and only of those can attention be read; "
            "clasp.models.zoo.to_native.to_native converts a ViT, a DINOv2 or a BERT"
        )
    first = net.settings.first_layer if isinstance(net, ImageTransformer) else 0
    found: dict[int, Block] = {}
    for layer, block in enumerate(net.blocks, first):
        assert isinstance(block, Block)
        found[layer] = block
    return found


@contextmanager
def _removing_hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
