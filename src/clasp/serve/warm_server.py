"""A server that already runs for a run folder: where it is, and how ``clasp search`` asks it.

Input: a run folder, and a search as typed. Output: a ``WarmAnswer``, or ``None`` if no server of this run answers, in
which case the caller loads the model itself. Note: ``RUN/server.json`` holds the address, the process id and a random
key, readable by its owner only. The key proves each to the other, so that whatever listens at a stale address is
ignored. Standard library only: asking must not cost the import of torch.
"""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clasp.serve.loopback import is_loopback

SERVER_FILE = "server.json"
_SECONDS = 20.0
_COMMAND = "/api/command/search"


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """What ``server.json`` holds."""

    address: str
    """``http://HOST:PORT``"""
    pid: int
    key: str


@dataclass(frozen=True, slots=True)
class WarmAnswer:
    """The answer of a server: as ``SearchAnswer.to_dict``, with the contact sheet as PNG, or one line of an error."""

    answer: dict[str, Any]
    sheet: bytes
    error: str = ""


def new_key() -> str:
    """A random key for a server."""
    return secrets.token_urlsafe(24)


def write_record(run: Path, record: ServerRecord) -> None:
    """Write ``server.json``, readable by its owner only. Raises ``OSError``."""
    part = run / f"{SERVER_FILE}.part"
    with suppress(FileNotFoundError):
        part.unlink()
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(record), file)
    os.replace(part, run / SERVER_FILE)


def remove_record(run: Path, record: ServerRecord) -> None:
    """Remove ``server.json`` if it is still this server's."""
    if read_record(run) == record:
        (run / SERVER_FILE).unlink(missing_ok=True)


def read_record(run: Path) -> ServerRecord | None:
    """The record of a run whose server's process exists; ``None`` for none, a damaged one or a stale one."""
    try:
        record = ServerRecord(**json.loads((run / SERVER_FILE).read_text(encoding="utf-8")))
        os.kill(record.pid, 0)
    except PermissionError:
        return None  # another user's process
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    return record


def ask_warm_server(
    run: Path,
    words: str | None,
    images: Sequence[tuple[bytes, float]],
    k: int,
    where: Sequence[str] = (),
    only_close: bool = False,
) -> WarmAnswer | None:
    """The answer of the run's server; ``None`` if there is none, or it is busy, or the search exceeds its limits.

    ``images``: encoded images with their weights.
    """
    record = read_record(run)
    if record is None or not is_loopback(urllib.parse.urlsplit(record.address).hostname or ""):
        return None  # a run folder from elsewhere must not send searches there
    given: dict[str, Any] = {"q": words or "", "k": k, "where": list(where)}
    if images:  # a server of an earlier version refuses what it does not know
        given |= {"image_bytes": [len(data) for data, _ in images], "image_weight": [weight for _, weight in images]}
    if only_close:
        given["only_close"] = True
    asked = urllib.parse.urlencode(given, doseq=True, errors="surrogatepass")
    request = urllib.request.Request(
        f"{record.address}{_COMMAND}?{asked}",
        data=b"".join(data for data, _ in images),
        headers={"x-clasp-key": record.key},
        method="POST",
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the address is of this machine
    try:
        with opener.open(request, timeout=_SECONDS) as reply:
            body = reply.read()
    except urllib.error.HTTPError as error:
        return _refusal(error)
    except (OSError, ValueError):
        return None
    length = int.from_bytes(body[:8])
    return WarmAnswer(json.loads(body[8 : 8 + length]), body[8 + length :])


def _refusal(error: urllib.error.HTTPError) -> WarmAnswer | None:
    """An error in the search itself; whatever else the server refuses, the caller does on its own."""
    if error.code != 400:
        return None
    try:
        line = json.loads(error.read())["error"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if "at most" in line else WarmAnswer({}, b"", line)
