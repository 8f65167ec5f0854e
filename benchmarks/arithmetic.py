"""FLOPs of a piece of work, counted where PyTorch dispatches its operations.

Unusual: PyTorch's counter does not know the fused attention of CPUs; its two operations are told here, by the formulas
that the counter has for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten


def _forward(query: Any, key: Any, value: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    formula._get_raw = True  # type: ignore[attr-defined]  # how the counter knows that tensors are wanted, not shapes
    return formula


CPU_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _raw(_forward),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _raw(_backward),
}


def counted(run: Callable[[], Any]) -> int:
    """FLOPs of products and convolutions while ``run`` runs."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()
