"""FLOPs of a computation, counted at PyTorch's dispatcher.

Input: a function to run. Output: ``Flops``, forward and backward separately. A multiply-add counts 2. Counted
are products of matrices and vectors, convolutions and fused attention; not norms, activations, softmax, sums or the
optimizer's step.
Note: the formulas are PyTorch's (``torch.utils.flop_counter``), but its ``FlopCounterMode`` cannot
separate interleaved forward and backward passes, lacks in-place products (the tiled losses) and the fused attention of
CPUs, and multiplies the backward pass of a grouped convolution by the number of groups. Product operations without a
formula are listed by name, not estimated; operations that bypass the dispatcher (compiled kernels) are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten

FLOPS_CONVENTION = (
    "products, convolutions and fused attention, a multiply-add as 2; no norms, activations, softmax, optimizer"
)

# Name parts of product operations. An operation with such a part and no formula is listed as left out.
_PRODUCTS = frozenset(
    "mm bmm addmm baddbmm addbmm sspaddmm smm matmul mv addmv dot vdot ger addr inner linear conv convolution "
    "attention mha encoder lstm gru rnn cdist fft".split()
)
# Operations of namespaces other than aten have no formulas; those of these do no arithmetic of a model.
_NO_ARITHMETIC = frozenset(("prim", "prims", "profiler", "c10d", "_c10d_functional", "debugprims", "rngprims"))


class Flops(NamedTuple):
    """Forward and backward FLOPs; ``forward`` includes recomputation (activation checkpointing, GradCache).

    ``left_out``: names of product operations without a formula.
    """

    forward: int
    backward: int
    left_out: tuple[str, ...] = ()


def count_total_flops(run: Callable[[], Any]) -> int:
    """Forward plus backward FLOPs of ``run()``."""
    flops = count_flops(run)
    return flops.forward + flops.backward


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of a forward pass, the count that papers give; works on the meta device."""
    with torch.no_grad():
        return count_flops(run).forward // 2


def count_flops(run: Callable[[], Any]) -> Flops:
    """FLOPs of ``run()``."""
    with FlopCounter() as counter:
        run()
    return counter.flops


class FlopCounter(TorchDispatchMode):
    """A context that counts every operation below autograd; results are the same bits with it and without."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._forward = self._backward = 0
        self._left_out: set[str] = set()

    @property
    def flops(self) -> Flops:
        """What was counted so far."""
        return Flops(self._forward, self._backward, tuple(sorted(self._left_out)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            packet: Any = func
        else:
            packet = func._overloadpacket
            if packet not in _FORMULAS and func is not torch.ops.prim.device.default:
                with self:  # without autograd, composite operations arrive undecomposed
                    decomposed = func.decompose(*args, **kwargs)
                if decomposed is not NotImplemented:
                    return decomposed
        out = func(*args, **kwargs)
        if packet in _FORMULAS:
            self._add(_FORMULAS[packet](*args, **kwargs, out_val=out))
        elif func.namespace not in _NO_ARITHMETIC and (func.namespace != "aten" or _takes_products(packet.__name__)):
            self._left_out.add(str(packet))
        return out

    def _add(self, flops: int) -> None:
        # The backward pass runs with gradients disabled; recomputation by activation checkpointing enables them.
        if torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            self._backward += flops
        else:
            self._forward += flops


def _takes_products(name: str) -> bool:
    return not _PRODUCTS.isdisjoint(name.strip("_").split("_"))


# --- formulas that PyTorch lacks, or has wrong -----------------------------------------------------------------------
# As the formulas of its registry they take the arguments of the operation, and its result as ``out_val``.


def _product(one: Tensor, other: Tensor, *rest: Any, out_val: Any = None, **options: Any) -> int:
    """Of matrices, batches of them or vectors: each element of ``one`` is multiplied with each column of ``other``."""
    return 2 * one.numel() * (other.shape[-1] if other.ndim > 1 else 1)


def _added_product(added: Tensor, one: Tensor, other: Tensor, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return _product(one, other)


def _outer(added: Tensor, one: Tensor, other: Tensor, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return 2 * one.numel() * other.numel()


def _convolution_backward(gradient: Tensor, inputs: Tensor, weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    """The gradients of inputs and of weights each cost one multiply-add per position and weight, as the forward pass.

    ``rest`` is bias, stride, padding, dilation, transposed, output padding, groups and output mask.
    """
    *_, transposed, _, _, output_mask = rest
    positions = inputs.shape[2:] if transposed else gradient.shape[2:]
    return sum(output_mask[:2]) * 2 * len(inputs) * prod(positions) * weight.numel()


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **options: Any
) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


def _packed_product(one: Tensor, packed: Tensor, *rest: Any, out_val: Tensor, **options: Any) -> int:
    return 2 * one.numel() * out_val.shape[-1]


def _of_onednn() -> dict[Any, Callable[..., int]]:
    """The formulas of oneDNN's operations (``models.packed_weights``), which not every build of PyTorch has."""
    if not torch.backends.mkldnn.is_available():
        return {}
    onednn = torch.ops.mkldnn
    return {onednn._linear_pointwise: _packed_product, onednn._reorder_linear_weight: lambda *_, **__: 0}


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **_of_onednn(),
    _ATEN.convolution_backward: _convolution_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _ATEN.addr: _outer,
    _ATEN.addr_: _outer,
    **dict.fromkeys((_ATEN.mv, _ATEN.dot, _ATEN.vdot), _product),
    **dict.fromkeys(
        (_ATEN.addmm_, _ATEN.baddbmm_, _ATEN.addbmm, _ATEN.addbmm_, _ATEN.addmv, _ATEN.addmv_, _ATEN._addmm_activation),
        _added_product,
    ),
}
