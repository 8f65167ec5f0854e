"""What goes on inside a net of ours while it runs: states at the points that MS-CLIP's authors probe, attention maps.

In go a net and a call that runs it once; out come its states by layer, or the weights by which its attention mixes.
Layers are counted from 0 as the sharing policy counts them, a stem being layer 0. Unusual: nothing of this is in the
nets. Hooks stand there while the call runs and at no other time, and maps are computed once more beside the attention,
which keeps none (``Attention.attention_weights``).
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


@dataclass(frozen=True, slots=True)
class Activations:
    """States ``[B N D]`` of every token in one run of a net, padding and prompts among them, by layer.

    ``norm1`` and ``norm2`` are what these norms gave, ``attention`` is what the attention gave, before it is scaled and
    added; with what was put there by tuning. ``final`` is what the net gave, after its final norm where it has one. In
    blocks that begin with their norms, norm 1 reads first, and norm 2 after the attention was added; in blocks that end
    with them, norm 1 reads the sum with the attention and norm 2 that with the feed-forward part.
    """

    norm1: dict[int, Float[Tensor, "B N D"]]
    attention: dict[int, Float[Tensor, "B N D"]]
    norm2: dict[int, Float[Tensor, "B N D"]]
    final: Float[Tensor, "B N D"]


def capture_activations(net: nn.Module, forward: _ForwardCall) -> Activations:
    """The states of ``net`` while ``forward`` runs it, as they are, so with what autograd keeps where it is on.

    Layers that ``forward`` leaves out, as a tower does that goes on from its trunk, are left out too. A tower runs its
    net once for ``tower(inputs)``, for ``tower.pooled`` of captions as often as it takes, and once more where it is
    first asked for its ``frozen_blocks``. Raises ``UserError`` for a net that is not ours.
    """
    found: dict[tuple[str, int], list[Tensor]] = {}

    def kept_as(point: str, layer: int) -> Callable[..., None]:
        return lambda module, args, output: found.setdefault((point, layer), []).append(output)

    handles = []
    for layer, block in _blocks(net).items():
        for point, part in (("norm1", block.norm1), ("attention", block.attn), ("norm2", block.norm2)):
            handles.append(part.register_forward_hook(kept_as(point, layer)))
    handles.append(net.get_submodule("norm").register_forward_hook(kept_as("final", 0)))
    with _removing_hooks(handles):
        forward()
    once = _single_calls(found)

    def by_layer(point: str) -> dict[int, Tensor]:
        return {layer: states for (name, layer), states in once.items() if name == point}

    return Activations(by_layer("norm1"), by_layer("attention"), by_layer("norm2"), once["final", 0])


def attention_maps(net: nn.Module, forward: _ForwardCall) -> dict[int, Float[Tensor, "B H N N"]]:
    """By layer, the weights by which each token (rows, which sum to 1) mixes the values of all, while ``forward`` runs.

    They take memory in the square of the tokens, and a second product of queries and keys. Raises ``UserError`` for a
    net that is not ours.
    """
    found: dict[tuple[str, int], list[Tensor]] = {}

    def mapped(layer: int) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, Attention)
            found.setdefault(("map", layer), []).append(module.attention_weights(*args))

        return before

    with _removing_hooks([block.attn.register_forward_pre_hook(mapped(n)) for n, block in _blocks(net).items()]):
        forward()
    return {layer: maps for (_, layer), maps in _single_calls(found).items()}


# --- how -------------------------------------------------------------------------------------------------------------


def _blocks(net: nn.Module) -> dict[int, Block]:
    if not isinstance(net, ImageTransformer | TextTransformer):
        raise UserError(
            f"{type(net).__name__} is no net of ours, and only of them it is known what goes on inside; "
            "nn.foreign.adopted.adopt makes one of a ViT, a DINOv2 or a BERT"
        )
    first = net.settings.first_layer if isinstance(net, ImageTransformer) else 0
    found: dict[int, Block] = {}
    for layer, block in enumerate(net.blocks, first):
        assert isinstance(block, Block)
        found[layer] = block
    return found


def _single_calls(found: dict[tuple[str, int], list[Tensor]]) -> dict[tuple[str, int], Tensor]:
    runs = {len(each) for each in found.values()}
    assert runs == {1}, f"the net was to run once and ran {max(runs, default=0)} times"
    return {at: each[0] for at, each in found.items()}


@contextmanager
def _removing_hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
