"""How many multiply-accumulates a call costs: matrix products and convolutions, nothing else.

In goes a call, best of a net on the meta device, where nothing is computed; out comes a number. Counted by PyTorch's
own flop counter, two flops to one multiply-accumulate, at the operators that run; attention is counted as its two
matrix products over all places, the causal half not left out. Norms, activations, softmax and look-ups do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of ``run()``, forward only."""
    # as plain matrix products: the counter knows no kernel of the CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2
