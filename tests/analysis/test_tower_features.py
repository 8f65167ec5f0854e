"""What a tower says of a stream: the vectors it would give alone, and block means against a slow obvious version."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clasp.analysis.tower_features import extract_tower_features
from clasp.models.partial_forward import as_tokens, block_states
from clasp.models.tower import Tower
from clasp.types import Pixels, PooledFeatures, Tokens
from toytowers import base, inputs

TOWERS = ("vit", "dinov3", "convnext", "efficientnet", "bert", "llama", "t5")
ROWS = 6


def stream(name: str) -> list[tuple[list[str], Pixels | Tokens]]:
    """Two batches; captions of several lengths, so that a tower would cut them into parts."""
    given = inputs(name, ROWS)
    ids = [f"{n}" for n in range(ROWS)]
    if isinstance(given, Tokens):
        lengths = torch.tensor([7, 2, 5, 3, 7, 1])
        given = replace(given, mask=torch.arange(7) < lengths[:, None])
        halves = [Tokens(given.ids[:4], given.mask[:4]), Tokens(given.ids[4:], given.mask[4:])]
    else:
        halves = [Pixels(given.values[:4]), Pixels(given.values[4:])]
    return [(ids[:4], halves[0]), (ids[4:], halves[1])]


@torch.no_grad()
def block_outputs(tower: Tower, batch: Pixels | Tokens) -> list[torch.Tensor]:
    """What each block gives out."""
    outputs: list[torch.Tensor] = []
    blocks = [tower.net.get_submodule(block.path) for block in tower._structure.blocks]
    hooks = [b.register_forward_hook(lambda _, __, output: outputs.append(block_states(output))) for b in blocks]
    tower.pooled(batch)
    for hook in hooks:
        hook.remove()
    return outputs


@torch.no_grad()
def slow_means(tower: Tower, name: str) -> list[torch.Tensor]:
    """Each input alone, without padding: the mean of what each block gives out."""
    rows: list[list[torch.Tensor]] = [[] for _ in tower._structure.blocks]
    for _, batch in stream(name):
        for n in range(len(batch.values if isinstance(batch, Pixels) else batch.ids)):
            if isinstance(batch, Pixels):
                alone: Pixels | Tokens = Pixels(batch.values[n : n + 1])
            else:
                real = batch.mask[n]
                alone = Tokens(batch.ids[n : n + 1, real], batch.mask[n : n + 1, real])
            for row, output in zip(rows, block_outputs(tower, alone), strict=True):
                row.append(as_tokens(output)[0].mean(dim=0))
    return [torch.stack(row) for row in rows]


@pytest.mark.parametrize("name", TOWERS)
def test_one_pass_gives_vectors_and_block_means(name: str):
    tower = Tower(base(name))
    said = extract_tower_features(tower, stream(name), [f"{n}" for n in range(ROWS)])
    assert said.ids == said.block_ids == tuple(f"{n}" for n in range(ROWS))
    with torch.no_grad():
        alone = torch.cat([tower.pooled(batch) for _, batch in stream(name)])
    assert torch.equal(said.pooled, alone) and torch.equal(said.plain_pooled, alone)
    for number, means in enumerate(slow_means(tower, name), 1):
        torch.testing.assert_close(said.block_means[number], means, rtol=1e-4, atol=1e-5)
    assert list(said.block_means) == list(range(1, len(tower._structure.blocks) + 1))


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_block_means_are_of_the_sample_alone(name: str):
    tower = Tower(base(name))
    everything, some = (
        extract_tower_features(tower, stream(name), [f"{n}" for n in range(ROWS)]),
        extract_tower_features(tower, stream(name), ["5", "2"]),
    )
    assert some.block_ids == ("2", "5")
    assert torch.equal(some.block_means[1], everything.block_means[1][[2, 5]])
    assert torch.equal(some.rows_of(["5", "0"]), everything.plain_pooled[[5, 0]])


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_prompts_are_no_part_of_the_mean(name: str):
    tower = Tower(base(name))
    tower.tune(["prompts(3)"], seed=0)
    said = extract_tower_features(tower, stream(name), ["0"])
    at = {"vit": 1, "bert": 0}[name]  # after the class token, or in front
    row = block_outputs(tower, stream(name)[0][1])[0][0]
    rest = torch.cat((row[:at], row[at + 3 :]))
    torch.testing.assert_close(said.block_means[1][0], rest.mean(dim=0))


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_states_of_a_trunk_say_the_same_without_the_blocks_below(name: str):
    tower = Tower(base(name)).requires_grad_(False)
    live = extract_tower_features(tower, stream(name), ["0", "5"])
    with torch.no_grad():
        cached = [(ids, Tower(base(name)).prefix_states(batch, 1)) for ids, batch in stream(name)]
    said = extract_tower_features(tower, cached, ["0", "5"])
    assert list(said.block_means) == [2]
    torch.testing.assert_close(said.block_means[2], live.block_means[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said.plain_pooled, live.plain_pooled, rtol=1e-4, atol=1e-5)


def test_pooled_features_are_kept_as_they_are():
    values = torch.randn(3, 5)
    said = extract_tower_features(Tower(base("vit")), [(["a", "b", "c"], PooledFeatures(values))], ["c"])
    assert torch.equal(said.pooled, values) and said.block_ids == ("c",) and not said.block_means


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_what_a_learned_pooling_adds_is_left_out(name: str):
    tower = Tower(base(name), pool="attention")
    assert tower.pooling is not None
    with torch.no_grad():
        tower.pooling.query.normal_()
    said = extract_tower_features(tower, stream(name))
    assert not torch.allclose(said.pooled, said.plain_pooled)
    assert torch.equal(
        said.plain_pooled, extract_tower_features(Tower(base(name), pool="mean"), stream(name)).plain_pooled
    )


def test_whoever_watches_hears_how_many_are_done():
    done: list[int] = []
    extract_tower_features(Tower(base("vit")), stream("vit"), (), done.append)
    assert done == [4, 6]
