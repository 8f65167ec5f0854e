"""One table: every method on every kind of tower, and what must hold for all of them."""

from __future__ import annotations

import pytest
import torch

from clasp.models.tower import Tower
from clasp.models.tuning.spec import apply_tuning, freeze_except, parse_tuning_spec
from clasp.types import UserError
from toymethods import CANNOT, METHODS, OTHER_PEFT
from toytowers import IMAGE_NETS, NETS, base, inputs

START_AS_IDENTITY = ("full", "none", "norms", "biases", "attention", "mlp", "last", "adapters", "conv_branch", *(
    "lora", "dora", "rslora", "ia3", "loha", "lokr", "oft", "hra",
))  # fmt: skip
ROWS = [(t, m) for t in NETS for m in METHODS] + [(t, m) for t in ("vit", "llama") for m in OTHER_PEFT]


@pytest.mark.parametrize(
    ("pool", "says"), [("avg", "not one of cls, mean"), ("cls", "no class token"), ("cls+mean", "no class")]
)
def test_a_pooling_that_cannot_be(pool: str, says: str):
    with pytest.raises(UserError, match=says):
        Tower(base("convnext", pool))


def test_every_exception_is_in_the_table():
    assert set(CANNOT) <= set(ROWS)


@pytest.mark.parametrize(("name", "method"), ROWS, ids=str)
def test_one_selection(name: str, method: str):
    tower = Tower(base(name))
    tower.train()
    given = inputs(name)
    with torch.no_grad():
        before = tower.pooled(given)
    if (name, method) in CANNOT:
        with pytest.raises(UserError, match=CANNOT[name, method]):
            tower.tune([method], seed=0)
        return
    names = tower.tune([method], seed=0)
    freeze_except(tower, names)
    after = tower.pooled(given)
    if method.partition("(")[0] in START_AS_IDENTITY:
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    if method == "none":
        assert names == set()
        return
    # what requires a gradient gets one, and nothing else does
    after.square().sum().backward()
    assert {n for n, p in tower.named_parameters() if p.grad is not None} == names
    # a step moves the selection only
    frozen = {n: p.detach().clone() for n, p in tower.named_parameters() if n not in names}
    torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(p, frozen[n]) for n, p in tower.named_parameters() if n in frozen)
    with torch.no_grad():
        assert not torch.equal(tower.pooled(given), before)


@pytest.mark.parametrize("name", NETS)
def test_selection_names_the_right_tensors(name: str):
    """Norms are vectors of norm modules; biases never include a position table; the two overlap in norm biases only."""
    net = base(name).net
    norms = {n for n in apply_tuning(net, ["norms"], seed=0)}
    assert norms
    assert all(dict(net.named_parameters())[n].ndim == 1 for n in norms)
    assert not any("scale" in n or "gamma" in n or "lambda" in n for n in norms)


def test_block_ranges():
    everything = apply_tuning(base("bert").net, ["norms"], seed=0)
    top = apply_tuning(base("bert").net, ["norms(blocks='1:')"], seed=0)
    assert top < everything
    assert {n for n in top if "layer.1." not in n} == set()
    assert apply_tuning(base("bert").net, ["norms(blocks=-1)"], seed=0) == top
    adapters = apply_tuning(base("vit").net, ["adapters(blocks='1:', reduction=8)"], seed=0)
    assert {n.split(".")[1] for n in adapters} == {"1"}


def test_combined_methods_do_not_depend_on_order():
    one, two = base("vit").net, base("vit").net
    a = apply_tuning(one, ["lora(rank=2)", "norms", "deep(1)", "adapters"], seed=0)
    b = apply_tuning(two, ["norms", "adapters", "deep(1)", "lora(rank=2)"], seed=0)
    assert a == b
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert any("layers.2.adapter1" in n for n in a), "an appended block gets its adapters too"
    assert "layers.2.attention.q_proj.base_layer.weight" in a, "and trains whole, also where peft wraps it"


def test_adapters_can_start_as_the_paper_has_them():
    tower = Tower(base("vit"))
    before = tower.pooled(inputs("vit"))
    tower.tune(["adapters(init='random', place='input')"], seed=0)
    assert not torch.allclose(tower.pooled(inputs("vit")), before)


def test_deep_copy_is_the_last_block():
    net = base("vit").net
    apply_tuning(net, ["deep(2)"], seed=0)
    assert len(net.layers) == 4
    for p, q in zip(net.layers[1].parameters(), net.layers[3].parameters(), strict=True):
        assert torch.equal(p, q) and p is not q


@pytest.mark.parametrize("name", ["mystery"])
def test_structure_is_found_where_the_family_is_unknown(name: str):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.mix(x)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.ffn, self.ln = Attention(), Attention(), torch.nn.RMSNorm(8)

        def forward(self, x):
            x = x + self.self_attn(self.ln(x))
            return x + self.ffn(x)

    class Mystery(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Linear(3, 8)
            self.stack = torch.nn.Sequential(*(Layer() for _ in range(3)))
            self.final = torch.nn.LayerNorm(8)

    net = Mystery()
    assert apply_tuning(net, ["last(1)"], seed=0) == {
        f"stack.2.{n}"
        for n in ("self_attn.mix.weight", "self_attn.mix.bias", "ffn.mix.weight", "ffn.mix.bias", "ln.weight")
    } | {"final.weight", "final.bias"}
    assert "stack.0.ln.weight" in apply_tuning(net, ["norms"], seed=0)
    assert len(apply_tuning(net, ["adapters"], seed=0)) == 3 * 2 * 4
    with pytest.raises(UserError, match="no known branch input"):
        apply_tuning(Mystery(), ["adapters(place='input')"], seed=0)
    with pytest.raises(UserError, match=r"no blocks found; looked for"):
        apply_tuning(torch.nn.Linear(2, 2), ["last(1)"], seed=0)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("adaptors", "did you mean 'adapters'"),
        ("lora(rank", "does not read as a method"),
        ("adapters(reduktion=2)", "no option 'reduktion'"),
        ("adapters(place='middle')", "output, input"),
        ("adapters(reduction=0)", "whole number from 1"),
        ("lora(rank=0)", "rank is a whole number from 1"),
        ("norms(blocks='a:b')", "is not a range"),
        ("last(1, 2)", "last takes"),
    ],
)
def test_what_does_not_read(spec: str, says: str):
    with pytest.raises(UserError, match=says):
        parse_tuning_spec(spec)


def test_nothing_matched_is_an_error():
    for spec, says in [
        ("match('no.such.*')", "no parameter has such a name"),
        ("adapters(blocks='7:')", "has blocks 0 to 1, and no block 7"),
        ("norms(blocks='1:99')", "has blocks 0 to 1, and no block 99"),
        ("adapters(blocks='1:1')", "matches nothing"),
        ("last(9)", "has 2 blocks"),
    ]:
        with pytest.raises(UserError, match=says):
            apply_tuning(base("bert").net, [spec], seed=0)
    with pytest.raises(UserError, match="none stands alone"):
        apply_tuning(base("bert").net, ["none", "norms"], seed=0)
    for spec in ("lora(rnak=3)", "ia3(rank=3)", "hra(alpha=1)"):
        with pytest.raises(UserError, match="does not take"):
            apply_tuning(base("bert").net, [spec], seed=0)


def test_batch_norm_keeps_its_statistics():
    tower = Tower(base("efficientnet"), dropout=True)
    tower.train()
    state = {n: b.clone() for n, b in tower.named_buffers()}
    tower.pooled(inputs("efficientnet"))
    assert state and all(torch.equal(b, state[n]) for n, b in tower.named_buffers())
    assert len(IMAGE_NETS) == 12
