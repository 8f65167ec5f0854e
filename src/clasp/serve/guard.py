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
from clasp.serve.warm_server import COMMAND_PATH

TOKEN_COOKIE = "clasp_token"
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
    def is_loopback(self) -> bool:
        """Whether the server is bound to this machine alone."""
        return is_loopback(self.host)

    def allows_host(self, host: str) -> bool:
        """Whether a ``Host`` header, with or without a port, names this server."""
        name = _host_name(host)
        return name in self.hosts or name == self.host or (is_loopback(name) if self.is_loopback else True)

    def allows_token(self, given: str) -> bool:
        """Whether a token is the server's; compared in constant time."""
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


class RequestGuard:
    """ASGI middleware: checks each request, limits its body, adds headers to its answer, and counts it."""

    def __init__(
        self,
        app: ASGIApp,
        policy: AccessPolicy,
        limits: ServeLimits,
        on_answer: Callable[[str, int, float], None],
    ) -> None:
        self._app, self._policy, self._limits, self._on_answer = app, policy, limits, on_answer
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            return await self._app(scope, receive, send)
        started, status = time.monotonic(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(n.encode(), v.encode()) for n, v in _HEADERS.items() if n.encode() not in present]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            await self._answer(scope, receive, send_with_headers)
        finally:
            self._on_answer(scope["path"], status, time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] == "/token" and scope["method"] == "POST" and self._policy.token:
            return await self._log_in(headers, receive, send)
        refused = self._refusal(scope, headers)
        if refused:
            return await _send_error(send, *refused)
        if not self._has_token(scope, headers):
            if scope["path"] == "/" and scope["method"] == "GET":
                return await _send(send, 401, _FORM.encode(), [("content-type", "text/html; charset=utf-8")])
            line = "this server wants its token, as the header 'Authorization: Bearer TOKEN'"
            return await _send_error(send, 401, line, [("www-authenticate", "Bearer")])
        is_read = scope["method"] in ("GET", "HEAD") and scope["path"] in ("/api/thumbnail", "/api/image")
        if not scope["path"].startswith("/api/") or is_read:
            return await self._app(scope, self._limited(receive), send)
        if self._active >= self._limits.waiting:
            return await _send_error(send, 429, "too many requests wait; try again", [("retry-after", "1")])
        self._active += 1
        try:
            await self._app(scope, self._limited(receive), send)
        finally:
            self._active -= 1

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and line for a request that is refused whatever its token."""
        host = headers.get("host", "")
        if not self._policy.allows_host(host):
            return 421, f"the host {host[:80]!r} is not a name of this server; clasp serve --allow-host NAME adds one"
        origin = headers.get("origin", "")
        if origin and urlsplit(origin).netloc != host and _host_name(urlsplit(origin).netloc) not in self._policy.hosts:
            return 403, "a page of another site may not use this server"
        if headers.get("sec-fetch-site") == "cross-site" and scope["path"] != "/":
            return 403, "a page of another site may not use this server"
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return 400, "the header Content-Length is not a number"
        if int(length) > self._limits.upload_bytes:
            return 413, f"the request has {int(length):,} bytes; at most {self._limits.upload_bytes:,} are read"
        return None

    def _has_token(self, scope: Scope, headers: dict[str, str]) -> bool:
        if not self._policy.token or scope["path"] in (*_OPEN_PATHS, COMMAND_PATH, "/page.css", "/icon.svg"):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._policy.allows_token(given.strip()):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(TOKEN_COOKIE)
        except CookieError:
            return False
        return cookie is not None and self._policy.allows_token(cookie.value)

    async def _log_in(self, headers: dict[str, str], receive: Receive, send: Send) -> None:
        """The form of the page without a token: sets the cookie."""
        refused = self._refusal({"path": "/token"}, headers)
        if refused:
            return await _send_error(send, *refused)
        body, limited = b"", self._limited(receive)
        while (message := await limited())["type"] == "http.request":
            body += message.get("body", b"")
            if len(body) > 10_000 or not message.get("more_body"):
                break
        given = parse_qs(body[:10_000].decode("utf-8", "replace")).get("token", [""])[0]
        if not self._policy.allows_token(given):
            return await _send(send, 401, _FORM.encode(), [("content-type", "text/html; charset=utf-8")])
        cookie: SimpleCookie = SimpleCookie({TOKEN_COOKIE: given})
        for name, value in (("httponly", True), ("samesite", "Strict"), ("path", "/")):
            cookie[TOKEN_COOKIE][name] = value
        await _send(send, 303, b"", [("location", "./"), ("set-cookie", cookie[TOKEN_COOKIE].OutputString())])

    def _limited(self, receive: Receive) -> Receive:
        """``receive`` that ends a request whose body is larger or slower than allowed."""
        read, ended = 0, False
        deadline = time.monotonic() + self._limits.seconds

        async def limited() -> Message:
            nonlocal read, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise BodyError(408, f"the request did not arrive within {self._limits.seconds:g} seconds") from None
            ended = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self._limits.upload_bytes:
                raise BodyError(413, f"the request has more than the {self._limits.upload_bytes:,} bytes that are read")
            return message

        return limited


class BodyError(HTTPException):
    """A request body that is too large or too slow, with the status of the answer."""


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
