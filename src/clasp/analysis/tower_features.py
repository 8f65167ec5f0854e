"""Extracts the features of a tower over a stream of inputs: pooled vectors and, for some inputs, mean states per block.

Input: a tower and an evaluation stream, of live inputs or cached features. Output: ``TowerFeatures``, on the CPU. Note:
everything comes from one pass through the tower, by forward hooks on its blocks. A learned pooling has no counterpart
in the base model, so representations are also pooled by their mean (``plain_pooled``), tuned or not.
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
    """The features of the inputs ``ids``.

    ``pooled``: the input of the heads. ``plain_pooled``: the same without learned pooling. ``block_means``: for the
    inputs ``block_ids``, the mean over real tokens of the hidden states after each block that was run, by block number
    from 1; the blocks below cached states are not run.
    """

    ids: tuple[str, ...]
    pooled: Float[Tensor, "n D"]
    plain_pooled: Float[Tensor, "n P"]
    block_ids: tuple[str, ...]
    block_means: dict[int, Float[Tensor, "m _"]]

    def rows_of(self, ids: Sequence[str]) -> Float[Tensor, "_ P"]:
        """``plain_pooled`` of these ids, in this order."""
        index = {id: row for row, id in enumerate(self.ids)}
        return self.plain_pooled[[index[id] for id in ids]]


def extract_tower_features(
    tower: Tower,
    stream: Iterable[tuple[Sequence[str], ImageInput | TextInput]],
    block_ids: Collection[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> TowerFeatures:
    """Run a stream through a tower once; ``progress`` is called with the number of inputs done. Pooled inputs pass
    through unchanged."""
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

    The tower would split captions into length buckets itself; here it is called on one bucket at a time, so that the
    rows in the hooks are those of the mask.
    """
    assert not isinstance(inputs, PooledFeatures)
    if isinstance(inputs, HiddenStates):
        frozen = tower.frozen_blocks  # its first access runs the encoder: do it before hooks are registered
        assert inputs.depth <= frozen, f"states after block {inputs.depth} of {tower.name} with {frozen} frozen blocks"
    if isinstance(inputs, Pixels):
        parts, order = [inputs], None
    else:
        assert inputs.rows is None, "an evaluation stream contains each text once"
        parts, order = split_by_length(inputs)
    pooled: list[Tensor] = []
    plain: list[Tensor] = []
    means: dict[int, list[Tensor]] = {}
    for part in parts:
        with _record_block_means(tower, part, means):
            vectors = _pooled_vectors(tower, part)
        pooled.append(vectors[0])
        plain.append(vectors[1])

    def joined(rows: list[Tensor]) -> Tensor:
        return torch.cat(rows) if order is None else torch.cat(rows)[order]

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
    """While the tower runs, append each block's mean hidden state to ``into``; blocks below cached states are not
    run."""
    children = dict(tower.net.named_children())
    prompts = prompts if isinstance(prompts := children.get("prompts"), PromptTokens) else None
    depth = part.depth if isinstance(part, HiddenStates) else 0

    def record(number: int, output: object) -> None:
        states = as_tokens(block_states(output))
        states = states if prompts is None else prompts.remove(states)
        mask = _token_mask(tower, part, states)
        assert states.shape[:2] == mask.shape, f"block {number} gave {tuple(states.shape)} for {tuple(mask.shape)}"
        weight = mask[:, :, None].to(states.dtype)
        into.setdefault(number, []).append((states * weight).sum(1) / weight.sum(1))

    hooks = [
        tower.net.get_submodule(block.path).register_forward_hook(lambda _, __, output, n=number: record(n, output))
        for number, block in enumerate(find_structure(tower.net).blocks, 1)
        if number > depth
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
