"""What a tower says of a stream of inputs: its pooled vectors and, of some of them, the mean state after each block.

In: a tower and a stream as evaluations read it, live inputs or cached states alike. Out: ``TowerFeatures``, on the CPU.
Unusual: everything comes of one pass through the tower, by hooks on its blocks. Where pooling is learned, no base has
it, so what the tower itself knows is told by the mean of its states (``plain``), tuned or not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clasp.models.length_buckets import split_by_length
from clasp.models.partial_forward import as_tokens, block_states
from clasp.models.pooling import POOLING_FUNCTIONS
from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.models.tuning.prompts import PromptTokens
from clasp.types import HiddenStates, ImageInput, Pixels, PooledFeatures, TextInput


@dataclass(frozen=True, slots=True)
class TowerFeatures:
    """What a tower said of ``ids``.

    ``pooled``: what the heads read. ``plain_pooled``: the same vectors without anything learned in their pooling.
    ``block_means``: of the inputs in ``block_ids``, the mean over real tokens of the states after each block that was
    run, by its number from 1; the blocks below cached states are not run.
    """

    ids: tuple[str, ...]
    pooled: Float[Tensor, "n D"]
    plain_pooled: Float[Tensor, "n P"]
    block_ids: tuple[str, ...]
    block_means: dict[int, Float[Tensor, "m _"]]

    def rows_of(self, ids: Sequence[str]) -> Float[Tensor, "_ P"]:
        """``plain_pooled`` of these ids, in this order."""
        place = {id: row for row, id in enumerate(self.ids)}
        return self.plain_pooled[[place[id] for id in ids]]


def extract_tower_features(
    tower: Tower,
    stream: Iterable[tuple[Sequence[str], ImageInput | TextInput]],
    block_ids: Collection[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> TowerFeatures:
    """Run a stream through a tower once; ``progress`` is told how many inputs are done. What is pooled already is
    kept."""
    ids: list[str] = []
    rows: dict[str, list[Tensor]] = {"pooled": [], "plain": []}
    chosen: list[str] = []
    blocks: dict[int, list[Tensor]] = {}
    with torch.inference_mode():
        for names, inputs in stream:
            if isinstance(inputs, PooledFeatures):
                pooled = plain = inputs.values
                means: dict[int, Tensor] = {}
            else:
                pooled, plain, means = _batch_features(tower, inputs)
            wanted = [row for row, name in enumerate(names) if name in block_ids]
            chosen += [names[row] for row in wanted]
            for number, states in means.items():
                blocks.setdefault(number, []).append(states[wanted].float().cpu())
            ids += names
            rows["pooled"].append(pooled.float().cpu())
            rows["plain"].append(plain.float().cpu())
            progress(len(ids))
    joined = {number: torch.cat(parts) for number, parts in sorted(blocks.items())}
    return TowerFeatures(tuple(ids), torch.cat(rows["pooled"]), torch.cat(rows["plain"]), tuple(chosen), joined)


def _batch_features(tower: Tower, inputs: Pixels | ImageInput | TextInput) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Pooled vectors, plainly pooled vectors and block means of a batch.

    The tower would cut captions into parts of like length by itself; here it gets each part alone, so that the hooks
    see the rows that the mask is about.
    """
    assert not isinstance(inputs, PooledFeatures)
    if isinstance(inputs, HiddenStates):
        trunk = tower.frozen_blocks  # the first who asks makes the net run, which no hook shall hear
        assert inputs.depth <= trunk, f"states after block {inputs.depth} of {tower.name}, whose trunk has {trunk}"
    if isinstance(inputs, Pixels):
        parts, back = [inputs], None
    else:
        assert inputs.rows is None, "a stream of an evaluation holds each text once"
        parts, back = split_by_length(inputs)
    pooled: list[Tensor] = []
    plain: list[Tensor] = []
    means: dict[int, list[Tensor]] = {}
    for part in parts:
        with _record_block_means(tower, part, means):
            vectors = _pooled_vectors(tower, part)
        pooled.append(vectors[0])
        plain.append(vectors[1])

    def joined(rows: list[Tensor]) -> Tensor:
        return torch.cat(rows) if back is None else torch.cat(rows)[back]

    return joined(pooled), joined(plain), {number: joined(rows) for number, rows in means.items()}


def _pooled_vectors(tower: Tower, part: Pixels | ImageInput | TextInput) -> tuple[Tensor, Tensor]:
    assert not isinstance(part, PooledFeatures)
    if tower.pooling is None:
        vectors = tower.pooled(part)
        return vectors, vectors
    states = tower(part)
    mask = _token_mask(tower, part, states)
    prefix = find_structure(tower.net).prefix_tokens if tower.modality == "image" else 0
    return tower.pool(states, mask), POOLING_FUNCTIONS["mean"](states, mask, prefix)


def _token_mask(
    tower: Tower, part: Pixels | ImageInput | TextInput, states: Float[Tensor, "B N D"]
) -> Bool[Tensor, "B N"]:
    if tower.modality == "text":
        assert not isinstance(part, Pixels | PooledFeatures)
        return part.mask
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


@contextmanager
def _record_block_means(
    tower: Tower, part: Pixels | ImageInput | TextInput, into: dict[int, list[Tensor]]
) -> Iterator[None]:
    """While the tower runs, put each block's mean state into ``into``; those below cached states are not run."""
    children = dict(tower.net.named_children())
    prompts = prompts if isinstance(prompts := children.get("prompts"), PromptTokens) else None
    depth = part.depth if isinstance(part, HiddenStates) else 0

    def keep(number: int, output: object) -> None:
        states = as_tokens(block_states(output))
        states = states if prompts is None else prompts.remove(states)
        mask = _token_mask(tower, part, states)
        assert states.shape[:2] == mask.shape, f"block {number} gave {tuple(states.shape)} for {tuple(mask.shape)}"
        weight = mask[:, :, None].to(states.dtype)
        into.setdefault(number, []).append((states * weight).sum(1) / weight.sum(1))

    hooks = [
        tower.net.get_submodule(block.path).register_forward_hook(lambda _, __, output, n=number: keep(n, output))
        for number, block in enumerate(find_structure(tower.net).blocks, 1)
        if number > depth
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
