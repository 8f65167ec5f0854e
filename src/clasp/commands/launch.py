"""``--processes N``: start N processes of the same command on this machine, and end with them.

Input: the number of processes and the arguments of the command. Output: the exit code. The processes are those of
``torchrun --standalone --nproc-per-node N -m clasp …`` (torch's elastic launcher), with Python's ``-P``. Note: as soon
as one process has failed, the others are ended: they get SIGTERM, and are killed after ``GRACE_SECONDS``. Ctrl-C
reaches the processes once, through the launcher, since they are in sessions of their own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from clasp.errors import UserError

GRACE_SECONDS = 60


def require_processes(count: int) -> None:
    """Raises ``UserError`` for a number of processes that this machine cannot run, or inside of torchrun."""
    import torch

    gpus = torch.cuda.device_count()
    most = gpus or available_cores()
    if count > most:
        raise UserError(f"--processes {count}: this machine has {most} {'GPUs' if gpus else 'cores'}; 1 to {most}")
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--processes {count} inside of torchrun, which has started the processes; leave it out")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def launch_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``clasp ARGUMENTS`` in ``count`` processes; returns the exit code of the first that failed, or 0.

    A process that was killed is named on standard error; one that failed has reported its error itself.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # our processes report their errors themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"clasp-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # else the name of the machine, which need not resolve
        max_restarts=0,
        shutdown_timeout=GRACE_SECONDS,
    )
    try:
        # -P: a file of the current folder, such as random.py, is no module
        elastic_launch(config, sys.executable)("-P", "-u", "-m", "clasp", *arguments)
    except SignalException:
        return 130
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        from clasp.report.console import print_error

        print_error(f"process {rank} of {count} was killed by {signal.Signals(-failure.exitcode).name}")
        return 1
    return 0
