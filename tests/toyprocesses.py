"""Several processes for a test, each at once: forks of a server that has imported what they use.

Goes in: nothing, or a job of several processes. Comes out: a context of ``multiprocessing``, or their exit codes and
what they found. Note: a process has one such server, which data workers start with less; it is then started anew.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clasp.training.distributed import Processes, connect
from clasp.types import UserError

IMPORTED = ["torch", "torch._dynamo", "pytest", "pyarrow.parquet", "clasp.cli", "clasp.commands.train"]
IMPORTED += [f"transformers.models.{name}.modeling_{name}" for name in ("vit", "bert")]


@cache
def fork_context() -> ForkServerContext:
    """The context whose server has ``IMPORTED``."""
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def start(size: int, folder: Path, job: Callable[[Processes], Any]) -> list[int | None]:
    """Run a job in ``size`` forks of a fresh process that has imported torch; their exit codes."""
    processes = [fork_context().Process(target=_work, args=(rank, size, str(folder), job)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def _work(rank: int, size: int, folder: str, job: Callable[[Processes], Any]) -> None:
    """One process: saves what the job returns, or its error; exits as the command would."""
    torch.set_num_threads(1)
    try:
        waiting = connect(rank, size, gpus=False, meeting=f"file://{folder}/meet")
        device = torch.device("cpu")
        found = job(Processes(rank=rank, size=size, local_rank=rank, local_size=size, device=device, waiting=waiting))
    except UserError as error:
        Path(folder, f"{rank}.txt").write_text(str(error), encoding="utf-8")
        raise SystemExit(2) from None
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
