"""Captions without padding: the states of padded ones, whatever their lengths, and where towers compute so."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from clasp.models.backbone import Backbone
from clasp.models.frozen import FrozenTower
from clasp.models.plain_attention import plain_attention_everywhere
from clasp.models.tower import Tower
from clasp.models.transformer.bert import BertEncoder, BertEncoderSettings
from clasp.models.transformer.packing import pack_rows
from clasp.types import Tokens

SETTINGS = BertEncoderSettings(
    vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, pad_token_id=1
)
MASKS = {
    "falling": torch.arange(9) < torch.tensor([9, 7, 7, 4, 1])[:, None],
    "mixed": torch.arange(9) < torch.tensor([4, 9, 1, 7, 9])[:, None],
    "full": torch.ones(5, 9, dtype=torch.bool),
    "one": torch.ones(1, 9, dtype=torch.bool),
    "left": torch.arange(9) >= torch.tensor([5, 0, 8, 2, 0])[:, None],
}


def net() -> BertEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = BertEncoder(SETTINGS).eval()
        for parameter in made.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape)
    return made


def tokens(name: str) -> Tokens:
    mask = MASKS[name]
    ids = torch.randint(2, 64, mask.shape, generator=torch.Generator().manual_seed(1))
    return Tokens(ids.masked_fill(~mask, 1), mask)


@pytest.mark.parametrize("name", MASKS)
def test_tokens_come_back_to_their_places(name: str) -> None:
    given = tokens(name)
    packing = pack_rows(given.mask)
    packed = packing.pack(given.ids)
    assert packed.shape == (1, int(given.mask.sum()))
    assert sum(captions * length for captions, length in packing.groups) == packed.shape[1]
    lengths = [length for _, length in packing.groups]
    assert lengths == sorted(set(lengths), reverse=True), "one call of attention for each length"
    back = packing.unpack(packed[..., None].float(), given.mask)[..., 0]
    assert torch.equal(back, given.ids * given.mask.float())


@pytest.mark.parametrize("name", MASKS)
def test_states_are_those_of_padded_captions(name: str) -> None:
    made, given = net(), tokens(name)
    with torch.inference_mode():
        padded = made(given.ids, given.mask).last_hidden_state
        packed = made.forward_packed(given.ids, given.mask)
    torch.testing.assert_close(packed[given.mask], padded[given.mask], rtol=1e-5, atol=1e-5)
    assert not packed[~given.mask].any()


def pooled(tower: Tower, given: Tokens, *, lower: bool) -> Tensor:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=lower):
        return tower.pooled(given)


@pytest.mark.parametrize("tuning", [None, "lora(rank=2)", "adapters", "norms", "deep(1)", "prompts(3)"])
@pytest.mark.parametrize("pool", ["mean", "cls", "last", "mean+max"])
def test_a_tower_encodes_in_bfloat16_within_its_rounding(tuning: str | None, pool: str, calls: list[str]) -> None:
    tower = Tower(Backbone("toy", "text", net(), "toy", pool))
    if tuning is not None:
        tower.tune([tuning], seed=0)
    given = tokens("mixed")
    calls.clear()
    exact = pooled(tower, given, lower=False)
    assert not calls, "in float32, features are bitwise those of padded captions"
    lower = pooled(tower, given, lower=True)
    assert bool(calls) == (tuning != "prompts(3)"), "prompts are put before each caption"
    assert (lower - exact).norm() < 0.03 * exact.norm()
    repeated = Tokens(given.ids, given.mask, torch.tensor([2, 0, 0, 4]))
    assert torch.equal(pooled(tower, repeated, lower=True), lower[repeated.rows])


@pytest.mark.parametrize("rows", ["mixed", "left"])
def test_layers_below_are_those_of_padded_captions(calls: list[str], rows: str) -> None:
    given = tokens(rows)
    tower, lower_layers = (Tower(Backbone("toy", "text", net(), "toy", "mean"), extra_layers=n) for n in ((), (1,)))
    exact = pooled(lower_layers, given, lower=False)
    calls.clear()
    lower = pooled(lower_layers, given, lower=True)
    assert calls and lower.shape == (5, 96) and (lower - exact).norm() < 0.03 * exact.norm()
    assert torch.equal(lower[:, :48], pooled(tower, given, lower=True)), "the last layer is cached with the others"


def test_gradients_need_rows_apart(calls: list[str]) -> None:
    given, tower = tokens("mixed"), Tower(Backbone("toy", "text", net(), "toy", "mean"))
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():  # the first pass of gradient caching, whose second pass has a gradient
            tower.pooled(given)
        tower.pooled(given).float().sum().backward()
    assert not calls
    assert pooled(tower, given, lower=True).shape == (5, 48) and calls


def test_with_dropout_on_captions_are_padded(calls: list[str]) -> None:
    tower = Tower(Backbone("toy", "text", net(), "toy", "mean"), dropout=True)
    calls.clear()
    assert pooled(tower.train(), tokens("mixed"), lower=True).shape == (5, 48) and not calls
    pooled(tower.eval(), tokens("mixed"), lower=True)
    assert calls


def test_the_key_of_cached_features_holds_whether_captions_were_padded() -> None:
    tower, lower_layers = (
        Tower(Backbone("toy", "text", net(), "toy", "mean"), extra_layers=n).requires_grad_(False) for n in ((), (1,))
    )
    both = {FrozenTower(each, precision="bfloat16").fingerprint for each in (tower, lower_layers)}
    assert len(both) == 1 and both.pop().endswith(":scaled-products:unpadded-scaled-products")
    assert FrozenTower(tower).fingerprint == FrozenTower(lower_layers).fingerprint == tower.layer_fingerprint


@pytest.mark.parametrize("name", MASKS)
def test_features_are_those_of_any_attention_kernel(name: str) -> None:
    """So that evaluation reads what training cached: training attends in plain products where these are faster."""
    tower = Tower(Backbone("toy", "text", net(), "toy", "mean")).requires_grad_(False)
    part = FrozenTower(tower, precision="bfloat16")
    found = []
    for kernel in (nullcontext, plain_attention_everywhere):
        with kernel(), torch.inference_mode():
            found.append((part.fingerprint, part(tokens(name)).values))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each call of ``forward_packed``, which runs as it is."""
    made: list[str] = []
    whole = BertEncoder.forward_packed

    def forward_packed(self: BertEncoder, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        made.append("packed")
        return whole(self, input_ids, attention_mask)

    monkeypatch.setattr(BertEncoder, "forward_packed", forward_packed)
    return made
