"""The kernel that attends: told, measured only where it matters, the same numbers, and kept by a run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clasp.training import attention_kernel
from clasp.training.attention_kernel import KernelChoice, choose_attention_kernel, use_attention_kernel

CPU = torch.device("cpu")


def test_the_recipe_has_the_first_word() -> None:
    assert choose_attention_kernel("plain", "float32", CPU) == KernelChoice("plain", "set by the recipe")


@pytest.mark.parametrize(("precision", "device"), [("float32", "cpu"), ("bfloat16", "cuda")])
def test_nothing_is_measured_where_the_fused_kernel_is_never_slower(precision, device, monkeypatch) -> None:
    monkeypatch.setattr(attention_kernel, "time_call", lambda run: pytest.fail("measured"))
    assert choose_attention_kernel("auto", precision, torch.device(device)).attention == "fused"


@pytest.mark.parametrize(("seconds", "chosen"), [((2.0, 1.0), "plain"), ((1.05, 1.0), "fused"), ((1.0, 2.0), "fused")])
def test_the_faster_one_is_taken(seconds, chosen, monkeypatch) -> None:
    clock = iter(seconds)
    monkeypatch.setattr(attention_kernel, "time_call", lambda run: next(clock))
    attention_kernel._faster_kernel.cache_clear()
    kernel = choose_attention_kernel("auto", "bfloat16", CPU)
    attention_kernel._faster_kernel.cache_clear()
    assert kernel.attention == chosen
    assert f"{seconds[0] / seconds[1]:.2g} times" in kernel.reason


def test_the_measurement_itself_runs() -> None:
    assert attention_kernel.time_call(lambda: attention_kernel._forward_and_backward("plain")) > 0


def test_both_kernels_say_the_same_and_the_choice_ends_with_its_context() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 16).unbind()
    fused = F.scaled_dot_product_attention(q, k, v)
    before = torch.backends.cuda.flash_sdp_enabled()
    with use_attention_kernel("plain"):
        assert not torch.backends.cuda.flash_sdp_enabled()
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), fused)
    assert torch.backends.cuda.flash_sdp_enabled() is before
