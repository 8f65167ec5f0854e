"""Which kernel attends: PyTorch's fused one, or plain products and a softmax.

In: the recipe's choice, the precision and the device. Out: the kernel's name and the reason as a sentence; a context in
which every ``scaled_dot_product_attention``, in whatever net, uses it.
Unusual: measured only where the two are known to differ. In float32 on a CPU they take the same time, and on a GPU the
fused one wins; in bfloat16 on some CPUs plain products are twice as fast at the lengths that towers see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clasp.training.precision import Precision

Attention = Literal["fused", "plain"]

# Plain products hold a map of N x N for each head: a gain smaller than this is not worth their memory.
WORTHWHILE = 1.1
SHAPE = (16, 6, 50, 64)  # pairs, heads, tokens, width of a head: a ViT-S/14 at 98 pixels
REPEATS = 5


class Kernel(NamedTuple):
    """A kernel and why it was chosen."""

    attention: Attention
    reason: str


def choose_attention(choice: Attention | Literal["auto"], precision: Precision, device: torch.device) -> Kernel:
    """The recipe's word where it has one, else the faster of the two, measured once per process."""
    if choice != "auto":
        return Kernel(choice, "set by the recipe")
    if precision == "float32" or device.type != "cpu":
        return Kernel("fused", f"never slower in {precision} on {device.type}")
    return _measured()


@contextmanager
def attending(attention: Attention) -> Iterator[None]:
    """Everything inside attends by this kernel."""
    if attention == "fused":  # whatever PyTorch would choose
        yield
    else:
        with sdpa_kernel(SDPBackend.MATH):
            yield


@cache
def _measured() -> Kernel:
    fused, plain = (fastest(partial(_forward_and_backward, name)) for name in ("fused", "plain"))
    said = f"plain products run at {fused / plain:.2g} times the speed of the fused kernel in bfloat16 on this CPU"
    return Kernel("plain" if fused >= WORTHWHILE * plain else "fused", said)


def fastest(run: Callable[[], None]) -> float:
    """Seconds of the least disturbed of a few runs; the first, which prepares kernels, does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return max(min(seconds[1:]), 1e-9)


def _forward_and_backward(attention: Attention) -> None:
    q, k, v = (torch.ones(SHAPE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with attending(attention):
        F.scaled_dot_product_attention(q, k, v).sum().backward()
