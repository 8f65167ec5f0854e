"""``--processes N``: start N processes of the same command on this machine, and end with them.

Input: the number of processes and the arguments of the command. Output: the exit code. The processes are those of
``torchrun --standalone --nproc-per-node N -m clasp …`` (torch's elastic launcher), with Python's ``-P``. Note: as soon
as one process has failed, the others are ended: they get SIGTERM, and are killed after ``GRACE_SECONDS``. Ctrl-C
reaches the processes once, through the launcher, since they are in sessions of their own. An interruption that the
first of them has not reported, the launcher reports. What is imported at the top is small: a command begins with it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from clasp.data.read_ahead import available_cores
from clasp.errors import UserError
from clasp.training.interrupt import INTERRUPTED_EXIT_CODE

GRACE_SECONDS = 60
_LAUNCHER = "CLASP_LAUNCHER"  # in the environment of the processes: its number, and a folder of its own
_REPORTING = "reporting"  # a file in that folder
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def is_launched() -> bool:
    """Whether this is one of several processes, of which one tells of a mistake."""
    return "RANK" in os.environ


def require_processes(count: int) -> None:
    """Raises ``UserError`` for a number of processes that this machine cannot run, or inside of torchrun."""
    import torch

    gpus = torch.cuda.device_count()
    most = gpus or available_cores()
    if count > most:
        raise UserError(f"--processes {count}: this machine has {most} {'GPUs' if gpus else 'cores'}; 1 to {most}")
    if is_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--processes {count} inside of torchrun, which has started the processes; leave it out")


class LaunchResult(NamedTuple):
    """The exit code of the first process that failed, 130 after a signal to the launcher, or 0; and whether the first
    process has reported its interruption."""

    code: int
    reported: bool


def launch_processes(count: int, arguments: Sequence[str]) -> LaunchResult:
    """Run ``clasp ARGUMENTS`` in ``count`` processes.

    A process that was killed is named on standard error; one that failed has reported its error itself.
    """
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="clasp-") as folder:
        os.environ[_LAUNCHER] = f"{os.getpid()} {folder}"
        try:
            code = _launch(count, arguments)
        except KeyboardInterrupt:  # before torch's launcher has taken over the signals
            code = INTERRUPTED_EXIT_CODE
        finally:
            del os.environ[_LAUNCHER]
        return LaunchResult(code, Path(folder, _REPORTING).exists())


def _launch(count: int, arguments: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", *logging.root.manager.loggerDict):  # our processes report their errors themselves
        if name.startswith("torch.distributed"):  # each logger has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
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
        return INTERRUPTED_EXIT_CODE
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        from clasp.report.console import print_error

        print_error(f"process {rank} of {count} was killed by {signal.Signals(-failure.exitcode).name}")
        return 1
    return 0


# --- in a process that was launched ----------------------------------------------------------------------------------


def end_with_launcher() -> None:
    """Let SIGTERM come where the launcher ends, however it ends (on Linux): training saves its state, all else ends."""
    if _LAUNCHER in os.environ and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(os.environ[_LAUNCHER].partition(" ")[0]):  # it had ended before
            os.kill(os.getpid(), signal.SIGTERM)


def begin_to_report() -> None:
    """This process reports its interruption, not its launcher, if it has one."""
    if _LAUNCHER in os.environ:
        Path(os.environ[_LAUNCHER].partition(" ")[2], _REPORTING).touch()


def exit_interrupted() -> NoReturn:
    """Exit code 130 and one line; of several processes none has the line but the first, or its launcher."""
    if _LAUNCHER not in os.environ and os.environ.get("RANK", "0") == "0":
        line = "clasp: stopped; the same command starts again, from what is cached or indexed so far"
        print(line, file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED_EXIT_CODE)
