"""Packed weights: the products of the layers themselves, as long as the context lasts, and no hook is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clasp.models.low_rank_forward import project_together
from clasp.models.packed_weights import packed_products, packed_weights, product, scaled_product
from clasp.models.tuning.peft_methods import inject_peft
from clasp.training.cost.flops import count_flops

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no products in bfloat16 here",
)


def layers(count: int = 3, *, bias: bool = True) -> list[nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [nn.Linear(48, 32 + 16 * number, bias=bias) for number in range(count)]


X = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def encoding() -> Iterator[None]:
    """The context of a call that encodes."""
    with torch.inference_mode(), packed_weights(), torch.autocast("cpu", torch.bfloat16):
        yield


def used_twice(given: Sequence[nn.Module]) -> list[Tensor] | None:
    packed_products(X, given)
    return packed_products(X, given)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.usefixtures("encoding")
def test_from_the_second_use_on_products_are_those_of_the_layers(count: int, bias: bool) -> None:
    given = layers(count, bias=bias)
    assert packed_products(X, given) is None, "packing would not pay for a single pass"
    for rows in (X, X[:1], X.expand(2, -1, -1, -1)):
        found = packed_products(rows, given)
        assert found is not None
        for one, same, layer in zip(found, project_together(rows, given), given, strict=True):
            torch.testing.assert_close(one, layer(rows), rtol=0.01, atol=0.01)
            assert torch.equal(one, same)


def test_where_several_passes_are_announced_the_first_is_packed() -> None:
    with torch.inference_mode(), packed_weights(at_once=True), torch.autocast("cpu", torch.bfloat16):
        assert packed_products(X, layers()) is not None
        assert packed_products(X, [nn.Sequential(*layers(1))]) is None


class _Factor(nn.Module):
    def __init__(self, values: Tensor):
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        return x * self.values


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("encoding")
def test_a_factor_is_in_the_product_unless_something_watches(bias: bool) -> None:
    (layer,), factor = layers(1, bias=bias), _Factor(torch.linspace(-2, 2, 32))
    packed, again = (scaled_product(layer, X, factor, factor.values) for _ in range(2))
    assert torch.equal(packed, again), "a first batch has the bits of later ones"
    called = factor(layer(X))
    assert called.dtype == torch.float32 and packed.dtype == torch.bfloat16
    torch.testing.assert_close(packed.float(), called, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", enabled=False):
        bias_or_none = None if layer.bias is None else layer.bias.double()
        exact = factor(nn.functional.linear(X.double(), layer.weight.double(), bias_or_none))
    assert (packed - exact).norm() <= 1.1 * (called - exact).norm(), "rounded no more often"
    for watched in (layer, factor):
        seen: list[Tensor] = []
        hook = watched.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        assert torch.equal(scaled_product(layer, X, factor, factor.values), factor(layer(X)))
        hook.remove()
        assert seen


def tuned(method: str = "lora", **options: Any) -> nn.ModuleList:
    """Three layers, the first and the last with an update that is not zero."""
    net = nn.ModuleList(layers())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_peft(net, method, ["0", "2"], {"rank": 4, **options})
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape)
    return net.eval()


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_low_rank_updates_are_in_the_product_of_their_layers(method: str) -> None:
    net, factor = tuned(method), _Factor(torch.linspace(-2, 2, 32))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        called, scaled = [layer(X) for layer in net], factor(net[0](X))
        with packed_weights():
            alone = scaled_product(net[0], X, factor, factor.values)
        with packed_weights(at_once=True):
            found, again = project_together(X, list(net)), project_together(X, list(net))
            product_of_both = scaled_product(net[0], X, factor, factor.values)
    with torch.inference_mode():
        exact = [layer(X) for layer in net]
    for one, same, other, whole in zip(found, again, called, exact, strict=True):
        assert torch.equal(one, same), "a first batch has the bits of later ones"
        assert one.dtype == other.dtype == torch.bfloat16
        assert (one - whole).norm() <= 1.1 * (other - whole).norm(), "rounded no more often"
    assert torch.equal(alone, scaled), "for a single pass it would not pay"
    assert product_of_both.dtype == torch.bfloat16
    torch.testing.assert_close(product_of_both.float(), scaled, rtol=0.02, atol=0.03)


CHANGES = {
    "a hook on the layer": lambda layer: layer.register_forward_hook(lambda *_: None),
    "a hook on its base": lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
    "a hook on A": lambda layer: layer.lora_A["default"].register_forward_pre_hook(lambda *_: None),
    "dropout in training": lambda layer: layer.lora_dropout["default"].train(),
    "no update": lambda layer: layer.enable_adapters(False),
    "float64": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_low_rank_layers_that_are_more_than_a_product_are_called(change: str) -> None:
    net = tuned(lora_dropout=0.5)
    with torch.inference_mode(), packed_weights(), torch.autocast("cpu", torch.bfloat16):
        assert used_twice([net[0]]) is not None
        CHANGES[change](net[0])
        assert used_twice([net[0]]) is None and used_twice(list(net)) is None


def test_changed_weights_are_seen_by_the_next_call() -> None:
    given = layers(1)
    found = []
    for _ in range(2):
        with torch.inference_mode(), packed_weights(), torch.autocast("cpu", torch.bfloat16):
            with packed_weights():  # the outer context owns them
                packed_products(X, given)
            found.append(product(given[0], X))
        given[0].weight.data.mul_(2)  # as an optimizer may: without a trace in the version of the tensor
    assert (found[1] - found[0]).abs().max() > 0.1
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert used_twice(given) is None, "outside of a context nothing is kept"


@pytest.mark.usefixtures("encoding")
def test_layers_that_are_more_than_a_product_are_called() -> None:
    calls, given = [], layers(1)
    assert used_twice(given) is not None
    hook = given[0].register_forward_hook(lambda *_: calls.append("hook"))
    product(given[0], X)
    assert calls == ["hook"]
    hook.remove()
    assert used_twice(given) is not None
    tuned = nn.Sequential(nn.Linear(48, 32))
    inject_peft(tuned, "dora", ["0"], {"rank": 4})
    assert used_twice([tuned[0]]) is None
    assert used_twice([type("Scaled", (nn.Linear,), {})(48, 32)]) is None
    double = layers(1)[0].double()
    outputs = [product(double, X.double()) for _ in range(2)]
    assert {output.dtype for output in outputs} == {torch.float64}, "autocast leaves float64 alone"


def test_training_float32_and_other_threads_call_the_layers() -> None:
    given, found = layers(1), []

    def use() -> None:  # inference mode and autocast are those of a thread
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found.append(used_twice(given))

    with packed_weights():
        with torch.autocast("cpu", torch.bfloat16):
            found.append(used_twice(given))
        with torch.inference_mode():
            found.append(used_twice(given))
        other = Thread(target=use)
        other.start()
        other.join()
    assert found == [None, None, None]


@pytest.mark.usefixtures("encoding")
def test_flops_are_those_of_the_layers() -> None:
    given = layers()
    plain, packed = count_flops(lambda: [layer(X) for layer in given]), count_flops(lambda: used_twice(given))
    assert packed == plain and not packed.left_out
