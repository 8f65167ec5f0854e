"""Batches read in threads, each while the one before it is used, where there are cores for both.

Input: items, and the function that reads one. Output: lists of results, in the order of the items. Note: images are
decoded and resized outside of Python's lock. What reading an item raises is raised when its batch is due; a consumer
that stops early closes the generator, and what was not begun is dropped.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


DECODE_THREADS = min(4, available_cores())
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_ahead(
    items: Sequence[_Item],
    read: Callable[[_Item], _Result],
    *,
    batch: int,
    threads: int = DECODE_THREADS,
    ahead: int = 1,
) -> Generator[list[_Result], None, None]:
    """Results of ``read`` in lists of ``batch``, the last one shorter; ``ahead``: batches read while one is used."""
    pool = ThreadPoolExecutor(threads, "clasp-read")
    pending: deque[list[Future[_Result]]] = deque()
    try:
        for start in range(0, len(items), batch):
            pending.append([pool.submit(read, item) for item in items[start : start + batch]])
            if len(pending) > ahead:
                yield [future.result() for future in pending.popleft()]
        for futures in pending:
            yield [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
