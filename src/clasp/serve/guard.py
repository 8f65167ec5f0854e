"""Checks of every request (host, origin, token, size of the body), and security headers of every answer.

Input: an ASGI application. Output: the same behind a ``RequestGuard``. Note: on a loopback address the ``Host`` header
must name one, or a web site whose name resolves to 127.0.0.1 could read the answers (DNS rebinding); a request that a
page of another origin makes is refused. Elsewhere a token is needed: as ``Authorization: Bearer``, or as the cookie
that the form sets which the page shows without it. Tokens are compared in constant time.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clasp.serve.limits import ServeLimits
from clasp.serve.loopback import is_loopback

TOKEN_COOKIE = "clasp_token"
COMMAND_PATH = "/api/command/search"
"""Answers ``clasp search`` of the same machine, which proves itself by the key in the run folder"""
_OPEN_PATHS = ("/health", "/ready")
_PAGE_POLICY = (
    "default-src 'none'; img-src 'self' blob:; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _PAGE_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_FORM = """<!doctype html><html lang="en"><meta charset="utf-8"><title>clasp</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="page.css">
<form class="token" method="post" action="token"><label>Token of this server
<input type="password" name="token" autocomplete="current-password" autofocus required></label>
<button>Open</button></form></html>"""


@dataclass(frozen=True, slots=True)
class AccessPolicy:
    """Who may ask. ``token`` empty: everybody who reaches the address; ``hosts``: further names of the server."""

    host: str = "127.0.0.1"
    token: str = ""
    hosts: Sequence[str] = ()

    @property
    def _host_name(host: str) -> str:
    """A ``Host`` header without its port, and an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


async def _send_error(send: Send, status: int, line: str, headers: Sequence[tuple[str, str]] = ()) -> None:
    body = json.dumps({"error": line}).encode()
    await _send(send, status, body, [("content-type", "application/json"), *headers])


async def _send(send: Send, status: int, body: bytes, headers: Sequence[tuple[str, str]]) -> None:
    pairs = [*headers, ("content-length", str(len(body))), ("cache-control", "no-store")]
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
