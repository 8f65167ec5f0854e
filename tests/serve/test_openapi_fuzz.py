"""Every operation of the OpenAPI description with seeded valid, odd and hostile requests: no 5xx but 503, and only
answers of a status that is described.

The long half is schemathesis (``pip install schemathesis``; ``schemathesis run http://127.0.0.1:8000/openapi.json``),
which found nothing else in 1,111 requests; it is not among the packages that the tests need.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

import httpx
import pytest
from fastapi.testclient import TestClient

from clasp.serve.editor import IndexEditor
from clasp.serve.public_text import public_id
from clasp.serve.upload_folder import UploadFolder
from toydata import COLOURS
from toysearch import png
from toyserver import toy_app, toy_service

REQUESTS = 30  # of each operation
TEXTS = [b"red", b"green -blue", b"folder=ring", b"year>=2003", b"a photo of a {}.", b"{}", b'"red']
TEXTS += [
    b"",
    b" ",
    b"\0",
    b"\r\nX: y",
    b"x" * 201,
    b"x" * 9000,
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"base64:%%%",
    b"base64:",
]
TEXTS += [
    b"../../etc/passwd",
    b"/etc/passwd",
    b"<script>",
    b"' OR 1=1 --",
    b"${jndi:ldap://x}",
    b"%s%n",
    b"{0.__class__}",
]
TEXTS += [
    "\u202e\u200b".encode(),
    "日本語 ١٢٣ 🙂".encode(),
    b"red -red",
    b"no=such",
    b"=",
    b"-" * 50,
    b"date~2020",
    b"bytes>1e999",
]
NUMBERS = [
    b"1",
    b"5",
    b"0",
    b"-1",
    b"100",
    b"101",
    b"1" + b"0" * 40,
    b"nan",
    b"1e3",
    b"1.5",
    b"true",
    b"",
    b"0x10",
    "٣".encode(),
]
GOOD = {"k": b"5", "offset": b"0", "where": b"year>=2001", "q": b"green -blue", "plus": b"red", "minus": b"black"}
GOOD |= {"names": b"red", "template": b"a {}", "v": b"abc"}
FILES = [png(colour) for colour in COLOURS.values()]
FILES += [
    b"",
    b"text",
    b"GIF89a",
    b"\x89PNG\r\n\x1a\n",
    FILES[0][:40],
    b"<svg/>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
    bytes(999),
]
NAMES = [b"a.png", b"../../x", b"", b"\xff.png", b"a\\b.png", b"x" * 500, b".", b"con.png", "é.png".encode()]
JSON_VALUES: list[Any] = [
    "red",
    "",
    " ",
    "x" * 300,
    0,
    -1,
    1e308,
    None,
    True,
    [],
    {},
    [[]],
    ["red"],
    {"texts": ["red"]},
    "\ud800",
]


class Operation(NamedTuple):
    method: str
    path: str
    described: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class Requests:
    """Random requests to an operation, by its description."""

    def __init__(self, document: dict[str, Any], ids: list[str]) -> None:
        self.document, self.chance = document, random.Random(0)
        self.texts = TEXTS + [public_id(name).encode() for name in ids] * 2
        self.good = dict(GOOD) | dict(
            zip(("id", "like", "unlike"), (public_id(name).encode() for name in ids), strict=False)
        )
        self.wild = 0.0

    def make(self, client: TestClient, operation: Operation) -> httpx.Request:
        self.wild = self.chance.choice([0.0, 0.1, 0.8])  # the fraction of what is not as it should be
        query = [(item["name"], item["schema"]) for item in operation.described.get("parameters", [])]
        address = "&".join(self.pairs(query))
        content, headers = self.body(operation)
        return client.build_request(operation.method, f"{operation.path}?{address}", content=content, headers=headers)

    def pairs(self, fields: list[tuple[str, dict[str, Any]]]) -> list[str]:
        return [f"{name}={quote_from_bytes(value)}" for name, value in self.values(fields)]

    def values(self, fields: list[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, bytes]]:
        """Each field left out, or given once or several times; at times one that does not exist."""
        for name, schema in fields:
            for _ in range(self.chance.choice([0, 2, 9]) if self.is_wild() else 1):
                odd = NUMBERS if "integer" in json.dumps(schema) else self.texts
                yield name, self.chance.choice(odd) if self.is_wild() else self.good.get(name, b"")
        if self.is_wild():
            yield self.chance.choice(["x", "__proto__", "q[]"]), b"1"

    def is_wild(self) -> bool:
        return self.chance.random() < self.wild

    def body(self, operation: Operation) -> tuple[bytes, dict[str, str]]:
        content = operation.described.get("requestBody", {}).get("content", {})
        if not content:
            return b"", {}
        kind = "text/plain" if self.is_wild() else self.chance.choice(list(content))
        schema = next(iter(content.values()))["schema"]
        fields = list(self.resolve(schema)["properties"].items())
        if kind == "multipart/form-data":
            return self.multipart(fields), {"content-type": f"{kind}; boundary=x"}
        if kind == "application/json":
            return self.json_body([name for name, _ in fields]), {"content-type": kind}
        return "&".join(self.pairs(fields)).encode(), {"content-type": kind}

    def resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        found = self.document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return found

    def multipart(self, fields: list[tuple[str, dict[str, Any]]]) -> bytes:
        parts = []
        texts = [(name, schema) for name, schema in fields if name not in ("image", "images")]
        for name, value in self.values(texts):
            parts.append(b'Content-Disposition: form-data; name="%b"\r\n\r\n%b' % (name.encode(), value))
        for name in dict(fields).keys() - dict(texts).keys():
            for _ in range(self.chance.choice([0, 2, 9]) if self.is_wild() else 1):
                head = b'Content-Disposition: form-data; name="%b"; filename="%b"' % (
                    name.encode(),
                    self.chance.choice(NAMES),
                )
                parts.append(
                    head
                    + b"\r\nContent-Type: image/png\r\n\r\n"
                    + self.chance.choice(FILES if self.is_wild() else FILES[:6])
                )
        whole = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"
        return whole[: self.chance.randrange(len(whole))] if self.is_wild() else whole

    def json_body(self, names: list[str]) -> bytes:
        value = {name: self.chance.choice(JSON_VALUES) if self.is_wild() else ["red", "a blue"] for name in names}
        whole = json.dumps(self.chance.choice(JSON_VALUES) if self.is_wild() else value).encode()
        return whole[:-1] if self.is_wild() else whole


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, list[str], Path]]:
    folder = tmp_path_factory.mktemp("fuzz")
    service = toy_service(folder)
    editor = IndexEditor(service, UploadFolder(folder / "uploads"))
    yield TestClient(toy_app(service, editor=editor), "http://127.0.0.1"), list(service_ids(folder)), folder
    service.close()


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def service_ids(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder / "pictures")) for path in (folder / "pictures").rglob("*.png"))


# of a form that is cut off, starlette leaves the file to the garbage collector to close
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning"
)
def test_every_operation_with_every_kind_of_value(server: tuple[TestClient, list[str], Path]):
    api, ids, folder = server
    document = api.get("/openapi.json").json()
    operations = [
        Operation(method.upper(), path, described)
        for path, methods in document["paths"].items()
        for method, described in methods.items()
    ]
    assert len(operations) >= 16
    requests, seen = Requests(document, ids[:20]), dict.fromkeys(map(str, operations), 0)
    for operation in operations:
        for _ in range(REQUESTS):
            request = requests.make(api, operation)
            reply = api.send(request)
            told = f"{request.method} {request.url} {request.content[:300]!r}: {reply.status_code} {reply.text[:300]}"
            assert reply.status_code < 500 or reply.status_code == 503, told
            assert str(reply.status_code) in operation.described["responses"], told
            if reply.status_code >= 400:
                assert set(reply.json()) == {"error"} and "\n" not in reply.json()["error"], told
            elif reply.headers["content-type"] == "application/json":
                json.loads(reply.content, parse_constant=refuse)
                seen[str(operation)] += 1
            else:
                seen[str(operation)] += 1
    assert all(seen.values()), f"answered at least once: {seen}"
    uploads = folder / "uploads"
    assert all(path.is_file() and path.suffix == ".png" for path in uploads.iterdir())
