"""A net cut between two blocks: run up to the cut, or go on from what the trunk left there.

In go a foreign net, its anatomy and a call that runs it; out come the states after its first ``depth`` blocks, or what
the net says when those states are put back. Unusual: nothing is asked of how a family calls its blocks. To stop, a hook
on the block below the cut leaves the net by an exception; to go on, the net runs on a blank input with the blocks below
the cut handing it through and the last of them giving out the states, so masks, positions and final norms are the
net's own. ``count_frozen_blocks`` reads from a selection how deep a cut can lie.
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
    """How many blocks from the bottom have nothing trained in or before them; ``trained`` are names in the net.

    All of them when only the tail trains (the final norm), none when something outside blocks and tail does.
    """
    depth = len(structure.blocks)
    for name in trained:
        at = (number for number, block in enumerate(structure.blocks) if name.startswith(f"{block.path}."))
        in_tail = any(name.startswith(f"{path}.") for path in structure.tail)
        depth = min(depth, next(at, len(structure.blocks) if in_tail else 0))
    return depth


def states_after_block(
    net: nn.Module, structure: ModelStructure, depth: int, run: Callable[[], Any]
) -> Float[Tensor, "B N D"]:
    """What block number ``depth`` (counted from 1) gives out while ``run`` runs the net; the net stops there."""
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
    """What ``run`` returns when the first ``depth`` blocks are not computed but left ``states``.

    ``output_type`` is what ``block_output_type`` said of the net.
    """
    with _replaced_blocks(net, structure, depth, states, output_type):
        return run()


def block_output_type(net: nn.Module, structure: ModelStructure, run: Callable[[], Any]) -> type | None:
    """What the blocks hand on while ``run`` runs the net: ``Tensor`` (their states), or a ``tuple`` of that alone.

    ``None`` where they hand on more, as T5's do with their position biases: such a net cannot be cut.
    """
    given: set[type | None] = set()

    def look(module: nn.Module, args: tuple, output: Any) -> None:
        alone = isinstance(output, Tensor) or (isinstance(output, tuple) and len(output) == 1)
        given.add((Tensor if isinstance(output, Tensor) else tuple) if alone else None)

    handles = [net.get_submodule(block.path).register_forward_hook(look) for block in structure.blocks]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return given.pop() if len(given) == 1 else None


def block_states(output: Any) -> Tensor:
    """The states in what a block gave out: alone, or first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def as_tokens(states: Tensor) -> Tensor:
    """Feature maps ``[B D h w]`` as tokens in row-major order, a vector a row as one token; tokens stay as they are."""
    if states.ndim == 2:
        return states[:, None]
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


class _StopForward(Exception):
    """The cut, with the states there. An exception is the one way out of a net of which nothing else is known."""

    def __init__(self, states: Tensor):
        super().__init__("the cut")
        self.states = states


def _stop_forward(module: nn.Module, args: tuple, output: Any) -> None:
    raise _StopForward(block_states(output))


@contextmanager
def _replaced_blocks(
    net: nn.Module, structure: ModelStructure, depth: int, states: Tensor, output_type: type
) -> Iterator[None]:
    """Blocks below the cut hand on what they get, the last of them ``states``; their own ``forward`` comes back after.

    An attribute of the instance shadows the method of its class, and modules, names and hooks all stay in place.
    """
    blocks = [net.get_submodule(block.path) for block in structure.blocks[:depth]]

    def came_in(args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def wrapped(out: Tensor) -> Any:
        return (out,) if output_type is tuple else out

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        return wrapped(came_in(args, kwargs))

    def give_out(*args: Any, **kwargs: Any) -> Any:
        return wrapped(_as_maps(states, structure) if came_in(args, kwargs).ndim == 4 else states)

    for block in blocks:
        vars(block)["forward"] = give_out if block is blocks[-1] else hand_on
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]


def _as_maps(states: Float[Tensor, "B N D"], structure: ModelStructure) -> Float[Tensor, "B D side side"]:
    """Tokens in row-major order as the square maps that they were."""
    side = math.isqrt(states.shape[1])
    assert side * side == states.shape[1], f"{states.shape[1]} tokens are no square map"
    layout = torch.channels_last if structure.channels_first else torch.contiguous_format
    return states.transpose(1, 2).unflatten(2, (side, side)).contiguous(memory_format=layout)
