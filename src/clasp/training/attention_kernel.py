"""Chooses the attention kernel: PyTorch's fused one, or plain matrix products and a softmax.

Input: the recipe's setting, the precision and the device. Output: the kernel's name and the reason as a sentence; a
context in which every ``scaled_dot_product_attention`` uses it. Note: measured only where the two are known to differ.
In float32 on a CPU they take the same time, and on a GPU the fused one is faster; in bfloat16 on some CPUs plain
products are twice as fast at the sequence lengths of towers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from clasp.models.plain_attention import plain_attention_everywhere
from clasp.plain_types import AttentionKernel, Precision

# Plain products store an N x N map for each head: a smaller speed-up than this is not worth the memory.
_MIN_SPEEDUP = 1.1
_BENCHMARK_SHAPE = (16, 6, 50, 64)  # batch, heads, tokens, head width: a ViT-S/14 at 98 pixels
_REPEATS = 5


class KernelChoice(NamedTuple):
    """A kernel and the reason for it."""

    attention: AttentionKernel
    reason: str


def choose_attention_kernel(
    choice: AttentionKernel | Literal["auto"], precision: Precision, device: torch.device
) -> KernelChoice:
    """The recipe's kernel; for "auto" the faster of the two, measured once per process."""
    if choice != "auto":
        return KernelChoice(choice, "set by the recipe")
    if precision == "float32" or device.type != "cpu":
        return KernelChoice("fused", f"never slower in {precision} on {device.type}")
    return _faster_kernel()


@contextmanager
def use_attention_kernel(attention: AttentionKernel) -> Iterator[None]:
    """Context in which ``scaled_dot_product_attention`` uses this kernel."""
    if attention == "fused":  # PyTorch's default choice
        yield
    else:
        with plain_attention_everywhere():
            yield


@cache
def _faster_kernel() -> KernelChoice:
    fused, plain = (time_call(partial(_forward_and_backward, name)) for name in ("fused", "plain"))
    reason = f"plain products run at {fused / plain:.2g} times the speed of the fused kernel in bfloat16 on this CPU"
    return KernelChoice("plain" if fused >= _MIN_SPEEDUP * plain else "fused", reason)


def time_call(run: Callable[[], None]) -> float:
    """Seconds of the fastest of a few runs, after a warm-up run."""
    seconds = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return max(min(seconds[1:]), 1e-9)


def _forward_and_backward(attention: AttentionKernel) -> None:
    q, k, v = (torch.ones(_BENCHMARK_SHAPE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with use_attention_kernel(attention):
        F.scaled_dot_product_attention(q, k, v).sum().backward()
