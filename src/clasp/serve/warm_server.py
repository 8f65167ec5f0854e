"""A server that already runs for a run folder: where it is, and how ``clasp search`` asks it.

Input: a run folder, and a search as typed. Output: a ``WarmAnswer``, or ``None`` if no server of this run answers, in
which case the caller loads the model itself. Note: ``RUN/server.json`` holds the address, the process id and a random
key, readable by its owner only, which is never sent: the command and the server prove to each other that they know it
(HMAC, RFC 2104) for a number that is used once, so that whatever listens at a stale address is ignored, and learns
nothing to ask with. Asking must not cost imports: standard library only, and one request over a socket, since
``http.client`` imports a mail parser and TLS.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import urllib.parse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from clasp.serve.loopback import is_loopback

SERVER_FILE = "server.json"
_SECONDS = 20.0
_REACHED_SECONDS = 2.0
COMMAND_PATH = "/api/command/search"
"""Answers ``clasp search`` of the same machine, which proves that it knows the key in the run folder"""
NONCE_FIELD, PROOF_FIELD = "x-clasp-nonce", "x-clasp-proof"
"""Fields of the request, the second also of the answer"""


class ServerRecord(NamedTuple):
    """What ``server.json`` holds."""

    address: str
    """``http://HOST:PORT``"""
    pid: int
    key: str


class WarmAnswer(NamedTuple):
    """The answer of a server: as ``SearchAnswer.to_dict``, with the contact sheet as PNG, or one line of an error."""

    answer: dict[str, Any]
    sheet: bytes
    error: str = ""


def new_key() -> str:
    """A random key for a server."""
    import secrets

    return secrets.token_urlsafe(24)


def request_proof(key: str, nonce: str, query: bytes, body: bytes) -> str:
    """What a command proves itself with: of its own number, the query of its address and its body."""
    return _proof(key, b"request", nonce.encode("latin-1", "replace"), query, body)


def answer_proof(key: str, nonce: str, body: bytes) -> str:
    """What a server proves itself with: of the number of the request and the body of its answer."""
    return _proof(key, b"answer", nonce.encode("latin-1", "replace"), body)


def _proof(key: str, *parts: bytes) -> str:
    whole = hmac.new(key.encode(), digestmod="sha256")
    for part in parts:  # each after its length, so that no two lists of parts are the same bytes
        whole.update(len(part).to_bytes(8))
        whole.update(part)
    return whole.hexdigest()


def write_record(run: Path, record: ServerRecord) -> None:
    """Write ``server.json``, readable by its owner only. Raises ``OSError``."""
    part = run / f"{SERVER_FILE}.part"
    with suppress(FileNotFoundError):
        part.unlink()
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(record._asdict(), file)
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
        place = urllib.parse.urlsplit(record.address)
        whole = bool(place.hostname and place.port) and isinstance(record.key, str)
        whole = whole and f"{place.netloc}{record.key}".isprintable()
    except PermissionError:
        return None  # another user's process
    except (OSError, ValueError, TypeError, AttributeError, OverflowError):
        return None
    return record if whole else None


def running_server(run: Path) -> ServerRecord | None:
    """The record of a run whose server can be reached."""
    record = read_record(run)
    if record is None:
        return None
    place = urllib.parse.urlsplit(record.address)
    try:
        socket.create_connection((place.hostname or "", place.port or 0), _REACHED_SECONDS).close()
    except OSError:
        return None  # another process has the number of one that ended
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
    try:
        code, body = _post(record, asked, b"".join(data for data, _ in images))
        if code == 400:  # what else the server refuses, the caller does on its own
            line = json.loads(body)["error"]
            return None if "at most" in line else WarmAnswer({}, b"", line)
        length = int.from_bytes(body[:8])
        return WarmAnswer(json.loads(body[8 : 8 + length]), body[8 + length :]) if code == 200 else None
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None


def _post(record: ServerRecord, query: str, body: bytes) -> tuple[int, bytes]:
    """The status and the body of the answer to one request, in a connection of its own.

    HTTP/1.0, so that the answer ends with the connection (RFC 1945). Raises ``OSError``, and ``ValueError`` or
    ``IndexError`` for what is no whole answer, or not of a server that knows the key.
    """
    place, nonce = urllib.parse.urlsplit(record.address), os.urandom(16).hex()
    proof = request_proof(record.key, nonce, query.encode(), body)
    given = {"host": place.netloc, "content-length": len(body), NONCE_FIELD: nonce, PROOF_FIELD: proof}
    path, fields = f"{COMMAND_PATH}?{query}", [f"{name}: {value}" for name, value in given.items()]
    with socket.create_connection((place.hostname or "", place.port or 0), _SECONDS) as connection:
        connection.sendall("\r\n".join((f"POST {path} HTTP/1.0", *fields, "", "")).encode("latin-1") + body)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *answered = head.decode("latin-1").split("\r\n")
    named = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in answered)}
    if not status.startswith("HTTP/") or int(named.get("content-length", -1)) != len(content):
        raise ValueError(f"{record.address} gave no whole answer")
    if not hmac.compare_digest(named.get(PROOF_FIELD, "").encode(), answer_proof(record.key, nonce, content).encode()):
        raise ValueError(f"{record.address} does not know the key of the run")
    return int(status.split()[1]), content
