"""The rows of a batch in threads of one core each, for nets that encode in bfloat16 on a CPU.

Input: a function of rows, and rows. Output: those of the function, in order. Note: cores that share each product wait
for each other at the end of every one; with rows of their own they meet once a batch. Rows do not interact, so the
outputs are the same to the bit, which a test holds. Measured with two threads (``dev/LOG.md``): any other number shares
products, as before. The function must be safe to run in several threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from threading import Barrier, Lock

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from clasp.models.packed_weights import announce_passes

_THREADS = 2
_LEAST_PIXELS = (
    300_000  # a batch for one pass on a CPU (``data.loader.inference_batch_size``); below, nothing is gained
)
_MOST_IMBALANCE = 1.07
_lock = Lock()


def row_threads() -> int:
    """The parts that rows are divided in: one for each thread that PyTorch computes in, where that was measured."""
    return _THREADS if torch.get_num_threads() == _THREADS else 1


def pays_to_divide(images: Float[Tensor, "B 3 height width"], parts: int) -> bool:
    """Whether a batch is large enough for so many parts, the largest of which determines the time."""
    count, _, height, width = images.shape
    even = -(-count // parts) * parts <= _MOST_IMBALANCE * count
    return parts > 1 and even and count * height * width >= _LEAST_PIXELS


def in_row_threads(
    run: Callable[[Tensor], Float[Tensor, "part D"]], rows: Float[Tensor, "B ..."]
) -> Float[Tensor, "B D"]:
    """``run(rows)``, in inference mode under autocast, as the caller is.

    In the calling thread where something looks on at its operations (counting FLOPs), which would miss those of others.
    """
    if is_in_torch_dispatch_mode():
        return run(rows)
    announce_passes()
    dtype = torch.get_autocast_dtype("cpu")

    def encode(part: Tensor) -> Tensor:  # both are of a thread
        with torch.inference_mode(), torch.autocast("cpu", dtype):
            return run(part)

    with _lock:
        pool = _pool(os.getpid())
    parts = rows.split(-(-len(rows) // _THREADS))
    return torch.cat([each.result() for each in [pool.submit(copy_context().run, encode, part) for part in parts]])


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process: a fork has none of its parent's."""
    threads, started = torch.get_num_threads(), Barrier(_THREADS + 1)
    pool = ThreadPoolExecutor(_THREADS, "clasp-rows", torch.set_num_threads, (1,))
    for _ in range(_THREADS):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(threads)  # the number is of a thread, and of all that begin later
    return pool
