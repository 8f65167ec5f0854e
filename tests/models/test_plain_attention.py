"""Plain attention: the numbers of the fused kernel, its masks and gradients, in every net while its context lasts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clasp.models.plain_attention import plain_attention_everywhere, plain_products

PADDED = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])[:, None, None]
MASKS = {
    "none": {},
    "padding": {"attn_mask": PADDED},
    "addend": {"attn_mask": torch.zeros(2, 1, 1, 7).masked_fill(~PADDED, -1e4)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
}


def states(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 7, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def attended(given: dict, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    inputs = states(dtype)
    out = F.scaled_dot_product_attention(*inputs, **given)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.float(), *(each.grad.float() for each in inputs if each.grad is not None)]


@pytest.mark.parametrize("given", MASKS.values(), ids=MASKS.keys())
def test_products_are_the_fused_kernel(given: dict) -> None:
    named = {"attn_mask": "mask", "is_causal": "causal", "scale": "scale"}
    out = plain_products(*states(), **{named[key]: value for key, value in given.items()})
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*states(), **given))


@pytest.mark.parametrize("given", MASKS.values(), ids=MASKS.keys())
def test_in_bfloat16_states_and_gradients_are_within_its_rounding(given: dict) -> None:
    exact = attended(given, torch.float32)
    with plain_attention_everywhere():
        plain = attended(given, torch.bfloat16)
    for ours, theirs in zip(plain, exact, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_autocast_computes_in_bfloat16() -> None:
    with plain_attention_everywhere(), torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*states()).dtype == torch.bfloat16


def test_float32_is_the_backend_of_torch_bit_by_bit() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(*states())
    with plain_attention_everywhere():
        assert torch.equal(F.scaled_dot_product_attention(*states()), theirs)


def test_grouped_queries_are_left_to_torch() -> None:
    q, k, v = states(torch.bfloat16)
    with plain_attention_everywhere():
        out = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    assert out.shape == q.shape


def test_dropout_drops_weights() -> None:
    ones = torch.ones(1, 1, 64, 8)
    out = plain_products(ones, ones, ones, dropout=0.5)
    assert out.std() > 0
    assert abs(out.mean() - 1) < 0.1


def test_a_query_without_keys_is_no_nan() -> None:
    assert plain_products(*states(), torch.zeros(7, 7, dtype=torch.bool)).isfinite().all()


def test_the_context_ends_and_nests() -> None:
    before = F.scaled_dot_product_attention
    with plain_attention_everywhere():
        inside = F.scaled_dot_product_attention
        with plain_attention_everywhere():
            pass
        assert F.scaled_dot_product_attention is inside
    assert F.scaled_dot_product_attention is before
