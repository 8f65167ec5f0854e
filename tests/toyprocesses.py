"""Several processes for a test, each at once: forks of a server that has imported what they use.

Goes in: nothing. Comes out: a context of ``multiprocessing``. Note: a process has one such server, which data workers
start with less; it is then started anew.
"""

from __future__ import annotations

import multiprocessing
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

IMPORTED = ["torch", "torch._dynamo", "pytest", "pyarrow.parquet", "clasp.cli", "clasp.commands.train"]
IMPORTED += [f"transformers.models.{name}.modeling_{name}" for name in ("vit", "bert")]


@cache
def fork_context() -> ForkServerContext:
    """The context whose server has ``IMPORTED``."""
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context
