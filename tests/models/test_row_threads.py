"""Rows in threads of one core each: the same bits, and only where nothing looks on at the passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from clasp.models.backbone import Backbone
from clasp.models.packed_weights import packed_weights
from clasp.models.row_threads import in_row_threads, pays_to_divide
from clasp.models.tower import Tower
from clasp.models.transformer.dinov2 import Dinov2Encoder, Dinov2EncoderSettings
from clasp.training.cost.flops import count_total_flops
from clasp.types import Pixels

IMAGES = torch.randn(34, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tower(*specs: str, **options: Any) -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Dinov2Encoder(
            Dinov2EncoderSettings(
                hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=96, patch_size=16
            )
        )
        for parameter in net.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape)
        found = Tower(Backbone("tiny", "image", net, "", "cls"), **options)
        found.tune(specs, seed=0)
        for name, parameter in found.named_parameters():
            if "lora_B" in name or "adapter" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape)
    return found


def encode(net: Tower, images: Tensor = IMAGES) -> Tensor:
    with torch.inference_mode(), packed_weights(at_once=True), torch.autocast("cpu", torch.bfloat16):
        return net.pooled(Pixels(images))


def threads_of(net: Tower, run: Callable[[], Any]) -> set[str]:
    """The threads in which the patch embedding ran."""
    found, projection = set(), net.net.get_submodule("embeddings.patch_embeddings.projection")
    plain = projection.forward

    def watched(x: Tensor) -> Tensor:
        found.add(threading.current_thread().name)
        return plain(x)

    vars(projection)["forward"] = watched
    run()
    del vars(projection)["forward"]
    return found


@pytest.mark.parametrize("spec", ["", "lora(rank=2)", "adapters(reduction=4)", "norms"])
def test_the_outputs_are_those_of_one_pass(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tower(*([spec] if spec else []))
    divided: list[Tensor] = []
    assert len(threads_of(net, lambda: divided.append(encode(net)))) == 2
    assert torch.get_num_threads() == 2, "the caller's own are left"
    monkeypatch.setattr("clasp.models.tower.row_threads", lambda: 1)
    assert torch.equal(divided[0], encode(net))


LOOKING_ON = {
    "float32": lambda net: threads_of(net, lambda: torch.inference_mode()(net.pooled)(Pixels(IMAGES))),
    "gradients": lambda net: threads_of(net, lambda: torch.autocast("cpu", torch.bfloat16)(net.pooled)(Pixels(IMAGES))),
    "a hook": lambda net: (
        net.net.register_forward_hook(lambda *_: None),
        threads_of(net, lambda: encode(net)),
    )[1],
    "a few images": lambda net: threads_of(net, lambda: encode(net, IMAGES[:30])),
    "another number of threads": lambda net: (torch.set_num_threads(1), threads_of(net, lambda: encode(net)))[1],
    "counting FLOPs": lambda net: threads_of(net, lambda: count_total_flops(lambda: encode(net))),
}


@pytest.mark.parametrize("why", LOOKING_ON)
def test_the_calling_thread_encodes(why: str) -> None:
    assert LOOKING_ON[why](tower()) == {threading.current_thread().name}


def test_lower_layers_are_pooled_in_the_calling_thread() -> None:
    net = tower(extra_layers=[1])
    assert len(threads_of(net, lambda: encode(net))) == 1


@pytest.mark.parametrize(("count", "pays"), [(32, False), (33, True), (34, True), (1, False)])
def test_what_pays(count: int, pays: bool) -> None:
    assert pays_to_divide(IMAGES[:count], 2) is pays
    assert not pays_to_divide(IMAGES[:count], 1)
    large = torch.empty(5, 3, 500, 500, device="meta")
    assert not pays_to_divide(large, 2), "three images take as long as six"


def test_an_error_is_raised_to_the_caller() -> None:
    def fail(part: Tensor) -> Tensor:
        raise ValueError(f"{len(part)} rows")

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="17 rows"):
        in_row_threads(fail, IMAGES)
