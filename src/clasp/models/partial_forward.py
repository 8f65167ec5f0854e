"""Partial forward passes: stop after a block of any net, or resume from the hidden states there.

Input: a foreign net, its ``ModelStructure`` and a call that runs it. Output: the hidden states ``[B N D]`` after its
first ``depth`` blocks, or the output of the net resumed from them. Note: this works without knowing how a family calls
its blocks. To stop, a forward hook raises an exception; to resume, the net runs on a blank input whose lower blocks
are identities, the last of them returning the cached states, so masks, positions and final norms are computed by the
net. ``count_frozen_blocks`` gives the depth of the frozen prefix for a selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.structure import ModelStructure


def count_frozen_blocks(structure: ModelStructure, trained: Iterable[str]) -> int:
    """The number of blocks in the frozen prefix; ``trained``: names of trainable parameters, relative to the net.

    All blocks when only the tail (the final norm) trains, 0 when a parameter outside blocks and tail does.
    """
    depth = len(structure.blocks)
    for name in trained:
        block_index = (i for i, block in enumerate(structure.blocks) if name.startswith(f"{block.path}."))
        in_tail = any(name.startswith(f"{path}.") for path in structure.tail)
        depth = min(depth, next(block_index, len(structure.blocks) if in_tail else 0))
    return depth


def states_after_block(
    net: nn.Module, structure: ModelStructure, depth: int, run: Callable[[], Any]
) -> Float[Tensor, "B N D"]:
    """The hidden states after ``depth`` blocks while ``run`` runs the net; the forward pass stops there."""
    handle = net.get_submodule(structure.blocks[depth - 1].path).register_forward_hook(_stop_forward)
    try:
        run()
    except _StopForward as reached:
        return as_tokens(reached.states)
    finally:
        handle.remove()
    raise AssertionError(f"{structure.family} never ran block {depth}")


def resume_from(
    net: nn.Module,
    structure: ModelStructure,
    depth: int,
    states: Float[Tensor, "B N D"],
    run: Callable[[], Any],
    *,
    output_type: type,
) -> Any:
    """The result of ``run`` when the first ``depth`` blocks are skipped and their output is ``states``.

    ``output_type`` is the result of ``block_output_type`` for the net.
    """
    with _replaced_blocks(net, structure, depth, states, output_type):
        return run()


def block_output_type(net: nn.Module, structure: ModelStructure, run: Callable[[], Any]) -> type | None:
    """The output type of the blocks while ``run`` runs the net: ``Tensor`` (their states), or a 1-tuple of it.

    ``None`` where they return more, such as T5's position biases: such a net cannot be resumed between blocks.
    """
    types: set[type | None] = set()

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        alone = isinstance(output, Tensor) or (isinstance(output, tuple) and len(output) == 1)
        types.add((Tensor if isinstance(output, Tensor) else tuple) if alone else None)

    handles = [net.get_submodule(block.path).register_forward_hook(record) for block in structure.blocks]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return types.pop() if len(types) == 1 else None


def block_states(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first element of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def as_tokens(states: Tensor) -> Tensor:
    """Feature maps ``[B D h w]`` as row-major tokens, vectors ``[B D]`` as one token each; tokens are unchanged."""
    if states.ndim == 2:
        return states[:, None]
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


class _StopForward(Exception):
    """Carries the hidden states out of a forward pass; an exception is the one way to stop an arbitrary net."""

    def __init__(self, states: Tensor):
        super().__init__("forward pass stopped")
        self.states = states


def _stop_forward(module: nn.Module, args: tuple, output: Any) -> None:
    raise _StopForward(block_states(output))


@contextmanager
def _replaced_blocks(
    net: nn.Module, structure: ModelStructure, depth: int, states: Tensor, output_type: type
) -> Iterator[None]:
    """Replace the ``forward`` of the first ``depth`` blocks: identities, the last returning ``states``. Restored after.

    An instance attribute shadows the method of the class, so modules, names and hooks are unchanged.
    """
    blocks = [net.get_submodule(block.path) for block in structure.blocks[:depth]]

    def block_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def wrapped(out: Tensor) -> Any:
        return (out,) if output_type is tuple else out

    def identity(*args: Any, **kwargs: Any) -> Any:
        return wrapped(block_input(args, kwargs))

    def return_states(*args: Any, **kwargs: Any) -> Any:
        return wrapped(_as_maps(states, structure) if block_input(args, kwargs).ndim == 4 else states)

    for block in blocks:
        vars(block)["forward"] = return_states if block is blocks[-1] else identity
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]


def _as_maps(states: Float[Tensor, "B N D"], structure: ModelStructure) -> Float[Tensor, "B D side side"]:
    """Row-major tokens back to the square feature maps they came from."""
    side = math.isqrt(states.shape[1])
    assert side * side == states.shape[1], f"{states.shape[1]} tokens do not form a square map"
    layout = torch.channels_last if structure.channels_first else torch.contiguous_format
    return states.transpose(1, 2).unflatten(2, (side, side)).contiguous(memory_format=layout)
