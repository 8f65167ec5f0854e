"""The processes of ``clasp serve``: bind an address, answer until told to stop, then end what runs.

Input: an ASGI application, an address, and the folder of the run. Output: nothing; ``UserError`` for an address that
cannot be bound. Note: the socket is bound before the model is loaded, so that a port in use is told at once;
connections wait in its backlog meanwhile. SIGINT and SIGTERM stop accepting, let running requests end, and then stop
the process. Several processes accept from one socket; none shares anything else with another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from clasp.plain_types import MessageCallback, UserError
from clasp.serve.loopback import is_loopback
from clasp.serve.warm_server import ServerRecord, remove_record, write_record

_CONNECTIONS = 256  # open at once; further ones are answered with 503
_SHUTDOWN_SECONDS = 10
_KEEP_ALIVE_SECONDS = 5


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A bound socket and the address at which it is reached."""

    socket: socket.socket
    url: str

    @property
    def local_url(self) -> str:
        """The address for a command on this machine: of an address that stands for all of its own, the loopback one."""
        return self.url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def bind_address(host: str, port: int, token: str) -> ServerAddress:
    """Bind the address. ``UserError`` if it is in use or unknown, or is not a loopback address and has no token."""
    if not is_loopback(host) and not token:
        raise UserError(
            f"--host {host} can be reached from other machines, so a token is needed: --token TEXT, or the environment "
            "variable CLASP_TOKEN"
        )
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is not a port; there are 0 (any free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"cannot listen at --host {host} --port {port}: {reason}; --port 0 takes any free one"
        ) from None
    taken = bound.getsockname()[1]
    return ServerAddress(bound, f"http://{f'[{host}]' if ':' in host else host}:{taken}")


def run_server(app: ASGIApp, bound: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # queries are nobody's business
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
        http="h11",
        ws="none",
        lifespan="off",
    )
    with _ends_on_signals():
        uvicorn.Server(config).run(sockets=[bound])


def run_workers(count: int, address: ServerAddress, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    """Run ``work(socket, *given)`` in ``count`` new processes until SIGINT or SIGTERM, or until one of them ends.

    Each uses its part of the cores, unless ``OMP_NUM_THREADS`` is set. ``UserError`` if one ended by itself: the others
    are stopped too.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(address.socket, *given), daemon=True) for _ in range(count)]
    ended = None
    with _ends_on_signals():
        try:
            for worker in workers:
                worker.start()
            ready = wait([worker.sentinel for worker in workers])
            ended = next(worker for worker in workers if worker.sentinel in ready)  # it may not be reaped yet
            ended.join()
        finally:
            _stop(workers)
    if ended is not None:
        raise UserError(f"one of {count} processes ended by itself (exit code {ended.exitcode}), so the server stopped")


def follow_first_process() -> None:
    """In a process of ``run_workers``: end when the first one ends, however that ends, and leave Ctrl-C to it."""
    first = multiprocessing.parent_process()
    assert first is not None

    def watch() -> None:
        first.join()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, name="clasp-follow", daemon=True).start()


def _stop(workers: list[Any]) -> None:
    """End the processes as SIGTERM ends one, and those that take longer than a graceful shutdown at once."""
    for worker in workers:
        if worker.pid is not None:
            worker.terminate()
    for worker in workers:
        if worker.pid is not None:
            worker.join(_SHUTDOWN_SECONDS + 5)
            worker.kill()


@contextmanager
def _ends_on_signals() -> Iterator[None]:
    """uvicorn raises SIGINT and SIGTERM again after a graceful shutdown; here they end the block."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def recorded_server(run: Path, address: ServerAddress, key: str, say: MessageCallback) -> Iterator[None]:
    """In this block ``RUN/server.json`` names the address. Where a folder cannot be written, ``clasp search`` loads the
    model itself."""
    record = ServerRecord(address.local_url, os.getpid(), key)
    try:
        write_record(run, record)
    except OSError as error:
        say(f"{run} cannot be written ({error.strerror}), so clasp search will not find this server")
    try:
        yield
    finally:
        remove_record(run, record)
