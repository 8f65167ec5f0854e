"""The HTTP API over a toy index: what it answers, what it refuses, and that no input makes it fail."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from clasp.search import verified_matrix
from clasp.serve.guard import AccessPolicy
from clasp.serve.metrics import ServerMetrics
from clasp.serve.public_text import public_id, stored_id
from clasp.serve.service import SearchService
from clasp.serve.warm_server import NONCE_FIELD, PROOF_FIELD, answer_proof, request_proof
from clasp.types import UserError
from toydata import COLOURS
from toysearch import png
from toyserver import KEY, LIMITS, ToyIndex, toy_app, toy_service

LOOPBACK = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchService]:
    made = toy_service(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def api(service: SearchService) -> TestClient:
    return TestClient(toy_app(service), LOOPBACK)


def upload(colour: str = "red", name: str = "image") -> dict[str, Any]:
    return {name: ("a.png", png(COLOURS[colour]), "image/png")}


def colours(body: dict[str, Any]) -> list[str]:
    return [re.split(r"[-.]", hit["id"])[1] for hit in body["hits"]]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_words_minus_terms_and_where_nothing_is_close(api: TestClient):
    body = api.get("/api/search", params={"q": "red", "k": 5}).json()
    assert set(colours(body)) == {"red"} and body["close_count"] == 5 and body["more"]
    hit = body["hits"][0]
    assert hit["score"] == pytest.approx(1, abs=0.01) and hit["close"] and hit["captions"][0].startswith("a red ")
    assert hit["meta"]["camera"] in ("Nikon", "Leica") and hit["name"].endswith(hit["id"])
    purple = api.get("/api/search", params={"q": "purple", "k": 5}).json()
    assert purple["close_count"] == 0 and len(purple["hits"]) == 5
    assert purple["note"].startswith("nothing is close: the best hit scores like a random caption does (p = 0.")
    without = api.get("/api/search", params={"q": "purple -blue", "k": 3}).json()
    assert "blue" in colours(purple) and "blue" not in colours(without)
    same = api.get("/api/search", params={"plus": "purple", "minus": "blue", "k": 3}).json()
    assert same["hits"] == without["hits"]


def test_images_feedback_and_more_like_this(api: TestClient):
    body = api.post("/api/search", files=upload("green"), data={"k": 5}).json()
    assert set(colours(body)) == {"green"} and body["close_count"] is None and body["hits"][0]["z"] is None
    both = api.post("/api/search", files=upload("green"), data={"q": "blue", "k": 8}).json()
    assert {"green", "blue"} & set(colours(both)) and both["p_value"] is not None
    away = api.post("/api/search", files=upload("green"), data={"q": "yellow", "k": 10, "image_weight": -0.5}).json()
    assert "green" not in colours(away)
    for sent, weight, line in ((True, 0, "weight of a search is 0.0"), (True, "nan", "is nan"), (False, 2, "no image")):
        files = upload("green") if sent else None
        reply = api.post("/api/search", files=files, data={"q": "red", "image_weight": weight})
        assert reply.status_code == 400 and line in reply.json()["error"]
    green, red = (
        api.get("/api/search", params={"q": name, "k": 1}).json()["hits"][0]["id"] for name in ("green", "red")
    )
    similar = api.get("/api/similar", params={"id": green, "k": 4}).json()
    assert similar["hits"][0]["id"] == green and set(colours(similar)) == {"green"}
    moved = api.get("/api/search", params={"q": "yellow", "like": red, "unlike": green, "k": 20}).json()
    still = api.get("/api/search", params={"q": "yellow", "k": 20}).json()
    assert colours(moved).index("red") < colours(still).index("red")


def test_several_images_with_weights(api: TestClient):
    def found(weights: Sequence[float], *names: str, **data: Any) -> Any:
        files = [("image", (f"{name}.png", png(COLOURS[name]), "image/png")) for name in names]
        return api.post("/api/search", files=files, data={"k": 12, "image_weight": weights, **data}).json()

    both = found([], "green", "blue")
    assert set(colours(both)) == {"green", "blue"}, "the mean of both is near to both"
    assert found([1, 1], "green", "blue")["hits"] == both["hits"]
    first = found([2, 0.5], "green", "blue")
    assert colours(first)[0] == "green" and colours(found([0.5, 2], "green", "blue"))[0] == "blue", "by their order"
    away = found([1, -0.5, -0.5], "green", "blue", "red", q="yellow")
    assert away["query"] == "yellow + a picture - a picture - a picture"
    assert not {"blue", "red"} & set(colours(away)) and away["p_value"] is not None
    for weights, names, line in (
        ([1], ("green", "blue"), "image_weight is 1 for 2 images; give one weight for each image"),
        ([1, 2, 3], ("green",), "image_weight is 1, 2, 3 for 1 image;"),
        ([1, -1], ("green", "green"), "cancels itself out"),
        ([], ("green",) * (LIMITS.images + 1), f"{LIMITS.images + 1} images is too large; at most {LIMITS.images}"),
    ):
        assert line in found(weights, *names)["error"]
    damaged = [*upload("green").items(), ("image", ("b.png", b"\x89PNG", "image/png"))]
    assert "cannot be read" in api.post("/api/search", files=damaged).json()["error"]
    assert api.post("/api/search", data={"q": "red", "image_weight": "x"}).status_code == 422
    empty = api.post("/api/search", data={"q": "red", "image_weight": "", "image": ""})
    assert empty.json() == api.get("/api/search", params={"q": "red"}).json(), "empty fields of a form are none"


def test_only_close_hits(api: TestClient):
    def found(q: str, **more: Any) -> Any:
        return api.get("/api/search", params={"q": q, "only_close": True, **more}).json()

    whole = api.get("/api/search", params={"q": "red", "k": 53}).json()
    count = whole["close_count"]
    assert 0 < count < len(whole["hits"])
    close = found("red", k=53)
    assert close["hits"] == whole["hits"][:count] and close["close_count"] == count and not close["more"]
    pages = [found("red", k=2, offset=start) for start in range(0, count + 2, 2)]
    assert [hit for page in pages for hit in page["hits"]] == close["hits"]
    assert [page["more"] for page in pages] == [start + 2 < count for start in range(0, count + 2, 2)]
    none = found("purple")
    assert none["hits"] == [] and none["close_count"] == 0 and not none["more"]
    assert none["note"].startswith("nothing is close: the best hit scores like a random caption does (p = 0.")
    assert found("red", where="folder=nowhere")["note"] == "no picture passes these filters"
    sent = api.post("/api/search", files=upload("green"), data={"q": "red", "only_close": "true", "k": 53}).json()
    assert sent["hits"][-1]["close"] and len(sent["hits"]) == sent["close_count"] < 53
    green = whole["hits"][0]["id"]
    for reply in (
        api.post("/api/search", files=upload("green"), data={"only_close": "true"}),
        api.get("/api/search", params={"like": green, "only_close": True}),
        api.get("/api/search", params={"q": "-red", "only_close": True}),
    ):
        assert reply.status_code == 400 and "words alone tell which hits are close" in reply.json()["error"]
    for path in ("/api/browse", "/api/similar"):
        assert api.get(path, params={"id": green, "only_close": True}).status_code == 422


def test_why_an_image_is_a_hit(api: TestClient):
    hit = api.get("/api/search", params={"q": "red -blue", "k": 1}).json()["hits"][0]
    why = api.get("/api/explain", params={"id": hit["id"], "q": "red -blue", "like": hit["id"], "k": 3}).json()
    assert why["captions"][0]["english"] == "red" and len(why["captions"]) == 3
    assert [(part["kind"], part["value"]) for part in why["parts"]] == [
        ("text", "red"), ("text", "blue"), ("like", hit["id"])
    ]  # fmt: skip
    assert why["parts"][0]["score"] == pytest.approx(hit["score"], abs=0.2) and why["parts"][1]["weight"] < 0
    assert why["parts"][0]["z"] == pytest.approx(hit["z"]) == why["captions"][0]["z"]
    assert api.get("/api/explain", params={"id": hit["id"]}).json()["parts"] == []
    refused = [({}, 422), ({"id": "none"}, 404), ({"id": hit["id"], "k": 101}, 422), ({"id": hit["id"], "q": " "}, 400)]
    for params, status in [
        *refused,
        ({"id": hit["id"], "like": "none"}, 400),
        ({"id": hit["id"], "where": "a=1"}, 422),
    ]:
        assert api.get("/api/explain", params=params).status_code == status, params


def test_filters_pages_and_browsing(api: TestClient):
    whole = api.get("/api/search", params={"q": "red", "k": 40}).json()
    pages = [api.get("/api/search", params={"q": "red", "k": 10, "offset": start}).json() for start in (0, 10, 20, 30)]
    assert [hit["id"] for page in pages for hit in page["hits"]] == [hit["id"] for hit in whole["hits"]]
    assert sum(1 + len(hit["duplicates"]) for hit in whole["hits"]) == 53
    ringed = api.get("/api/browse", params={"where": ["folder=ring", "year>=2003"], "k": 100}).json()
    assert ringed["total"] == len(ringed["entries"]) > 0 and not ringed["more"]
    assert all(entry["id"].startswith("ring/") and int(entry["meta"]["year"]) >= 2003 for entry in ringed["entries"])
    browsed = [api.get("/api/browse", params={"k": 20, "offset": start}).json() for start in (0, 20, 40)]
    assert [page["more"] for page in browsed] == [True, True, False]
    assert len({entry["id"] for page in browsed for entry in page["entries"]}) == 53
    named = api.get("/api/search", params={"q": "red", "where": "caption~circle", "k": 50}).json()
    assert all("circle" in hit["captions"][0] for hit in named["hits"])


def test_images_of_entries(api: TestClient, service: SearchService):
    hit = api.get("/api/search", params={"q": "red", "k": 1}).json()["hits"][0]
    original = api.get(hit["image"])
    assert original.headers["content-type"] == "image/png" and original.content == Path(hit["name"]).read_bytes()
    assert "sandbox" in original.headers["content-security-policy"] and "immutable" in original.headers["cache-control"]
    small = api.get(hit["thumbnail"])
    assert small.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(small.content)).size == (32, 32)
    assert api.get(hit["thumbnail"]).content == small.content
    path = Path(hit["name"])
    before = path.read_bytes()
    try:
        path.write_bytes(png(COLOURS["black"]))
        changed = api.get(hit["image"])
        assert changed.status_code == 404 and "has changed since it was indexed" in changed.json()["error"]
        path.unlink()
        gone = api.get(hit["image"])
        assert gone.status_code == 404 and "cannot be read" in gone.json()["error"]
    finally:
        path.write_bytes(before)


def test_classify_and_embed(api: TestClient):
    given = {"names": ["green", "red", "blue"], "template": "a {}"}
    classes = api.post("/api/classify", files=upload("red"), data=given).json()["classes"]
    assert classes[0] == {"name": "red", "score": pytest.approx(1, abs=0.01)}
    assert {each["name"] for each in classes} == {"green", "red", "blue"}
    texts = api.post("/api/embed/text", json={"texts": ["red", "green", "red"]}).json()["embeddings"]
    image = api.post("/api/embed/image", files=upload("red")).json()["embeddings"]
    assert texts[0] == texts[2] != texts[1] and texts[0] == pytest.approx(image[0], abs=0.01)


def test_status(api: TestClient):
    info = api.get("/api/info").json()
    assert (info["run"], info["model"], info["entries"]) == ("toys", "colours", 53)
    fields = {field["name"]: field["values"] for field in info["fields"]}
    assert list(fields)[:5] == ["folder", "caption", "language", "group", "name"]
    assert set(fields["camera"]) == {"Nikon", "Leica"} and fields["language"] == {"en": 53}
    assert api.get("/health").json() == {"status": "ok"} and api.get("/ready").json() == {"entries": 53}
    api.get("/api/secret/path")
    text = api.get("/metrics").text
    assert 'clasp_requests_total{path="/api/info",status="200"}' in text and "clasp_model_calls_total" in text
    assert 'path="other",status="404"' in text and "secret" not in text
    described = api.get("/openapi.json").json()
    assert {"/api/search", "/api/similar", "/api/classify", "/api/embed/text", "/api/browse"} <= set(described["paths"])
    assert "multipart/form-data" in described["paths"]["/api/search"]["post"]["requestBody"]["content"]
    page = api.get("/")
    assert page.text.startswith("<!doctype html>") and "default-src 'none'" in page.headers["content-security-policy"]
    assert {api.get(path).status_code for path in ("/page.css", "/page.js", "/icon.svg")} == {200}


# --- refusals --------------------------------------------------------------------------------------------------------

IMAGE_BOMB = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x01\x86\xa0\x00\x01\x86\xa0\x08\x02\x00\x00\x00"
IMAGE_BOMB += zlib.crc32(IMAGE_BOMB[12:29]).to_bytes(4)
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
HOSTILE_FILES = {
    "empty": b"",
    "text": b"hello",
    "svg": SVG,
    "postscript": POSTSCRIPT,
    "cut png": png(COLOURS["red"], 64)[:60],
    "bomb": IMAGE_BOMB,
    "gif header": b"GIF89a",
    "zip": b"PK\x03\x04" + bytes(100),
    "null bytes": bytes(1000),
}
HOSTILE_QUERIES: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({}, 400, "given neither"),
    "blank": ({"q": " "}, 400, "which are blank"),
    "too long": ({"q": "x" * 201}, 400, "at most 200"),
    "cancels": ({"q": "red -red"}, 400, "cancels itself out"),
    "weight huge": ({"q": "red^" + "9" * 40}, 400, "a weight of a search is 1e+40"),
    "weight no number": ({"q": "red^x"}, 400, "the weight in 'red^x' is not a number; type dog^2"),
    "k 0": ({"q": "red", "k": 0}, 422, "k: "),
    "k huge": ({"q": "red", "k": 101}, 400, "at most 100"),
    "k text": ({"q": "red", "k": "many"}, 422, "k: "),
    "offset negative": ({"q": "red", "offset": -1}, 422, "offset: "),
    "offset huge": ({"q": "red", "offset": 10**30}, 400, "too far down"),
    "no such id": ({"like": "../../etc/passwd"}, 400, "no image is indexed under the id"),
    "damaged id": ({"like": "base64:%%%"}, 400, "is damaged"),
    "like and unlike": ({"like": "a", "unlike": "a"}, 400, "as liked and as unliked"),
    "unknown field": ({"q": "red", "where": "lens=50"}, 400, "there are folder, caption"),
    "no condition": ({"q": "red", "where": "folder"}, 400, "folder=holidays"),
    "unknown parameter": ({"q": "red", "sort": "name"}, 422, "sort: "),
    "unknown parameter of two lines": ({"q": "red", "a\nb": "name"}, 422, r"'a\nb': "),
    "unknown parameter of many letters": ({"q": "red", "a" * 1000: "name"}, 422, f"'{'a' * 76}...: "),
    "too many parts": ({"q": "red", "plus": ["red"] * 9}, 400, "at most 8"),
    "control characters": ({"q": "\x00\x01\x02"}, 400, "which are blank"),
    "markup": ({"q": "<script>alert(1)</script>", "like": "<b>"}, 400, "no image is indexed"),
}


@pytest.mark.parametrize("name", HOSTILE_QUERIES)
def test_hostile_queries(api: TestClient, name: str):
    params, status, line = HOSTILE_QUERIES[name]
    reply = api.get("/api/search", params=params)
    assert reply.status_code == status, reply.text
    assert line in reply.json()["error"] and "\n" not in reply.json()["error"]
    assert api.post("/api/search", data=params).status_code == status


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_files(api: TestClient, name: str):
    file = {"image": ("../../x\x00.png", HOSTILE_FILES[name], "image/png")}
    for path, data in (("/api/search", {}), ("/api/embed/image", {}), ("/api/classify", {"names": ["red"]})):
        reply = api.post(path, files=file, data=data)
        assert reply.status_code in (400, 422), reply.text
        assert "\n" not in reply.json()["error"]


def test_other_bad_bodies(api: TestClient):
    replies = [
        api.post("/api/embed/text", content=b"{"),
        api.post("/api/embed/text", json={"texts": []}),
        api.post("/api/embed/text", json={"texts": ["red"] * 21}),
        api.post("/api/embed/text", json={"texts": [1]}),
        api.post("/api/embed/text", content=b'{"texts": ["\\ud800"]}', headers={"content-type": "application/json"}),
        api.post("/api/embed/text", json={"texts": [" "]}),
        api.post("/api/classify", files=upload(), data={"names": ["red"], "template": "no place"}),
        api.post("/api/classify", data={"names": ["red"]}),
        api.post("/api/search", data={"image": "a text"}),
        api.post("/api/search", content=b"--x", headers={"content-type": "multipart/form-data; boundary=y"}),
        api.post("/api/search", content=b"x", headers={"content-type": "multipart/form-data"}),
        api.get("/api/thumbnail", params={"id": "../../../etc/passwd"}),
        api.get("/api/image", params={"id": "/etc/passwd"}),
        api.get("/api/image"),
        api.get("/../pyproject.toml"),
        api.get("/page/index.html"),
        api.delete("/api/search"),
    ]
    for reply in replies:
        assert 400 <= reply.status_code < 500, (reply.request.url, reply.text)
        assert set(reply.json()) == {"error"} and "\n" not in reply.json()["error"], reply.text


def test_bodies_are_limited(api: TestClient):
    large = {"image": ("a.png", bytes(LIMITS.upload_bytes + 1), "image/png")}
    assert api.post("/api/search", files=large).status_code == 413

    def chunks() -> Iterator[bytes]:  # without a length
        yield b"--y\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n"
        for _ in range(40):
            yield bytes(10_000)

    kind = {"content-type": "multipart/form-data; boundary=y"}
    reply = api.post("/api/search", content=chunks(), headers=kind)
    assert reply.status_code == 413 and "200,000 bytes" in reply.json()["error"]
    assert api.post("/api/search", headers={"content-length": "-5"}).status_code == 400


# --- who may ask -----------------------------------------------------------------------------------------------------


def test_names_of_the_server(api: TestClient):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        reply = api.get("/api/info", headers={"host": host})
        assert reply.status_code == 421 and "--allow-host" in reply.json()["error"]
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert api.get("/api/info", headers={"host": host}).status_code == 200
    own = {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}
    assert api.get("/api/info", headers=own).status_code == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9000", "null"):
        assert api.post("/api/search", headers={**own, "origin": origin}).status_code == 403
    assert api.get("/api/info", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert "access-control-allow-origin" not in api.get("/api/info", headers=own).headers


def test_a_token_where_others_can_reach_it(service: SearchService):
    policy = AccessPolicy("0.0.0.0", "sesame 1", ("pictures.example",))
    api = TestClient(toy_app(service, policy), "http://pictures.example")
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "sesame 1"}, {"cookie": "clasp_token=no"}):
        assert api.get("/api/info", headers=headers).status_code == 401
        assert api.get("/metrics", headers=headers).status_code == 401
    assert api.get("/api/info", headers={"authorization": "Bearer sesame 1"}).status_code == 200
    assert api.get("/health").status_code == 200
    form = api.get("/")
    assert form.status_code == 401 and 'name="token"' in form.text
    assert api.post("/token", data={"token": "wrong"}, follow_redirects=False).status_code == 401
    entered = api.post("/token", data={"token": "sesame 1"}, follow_redirects=False)
    assert entered.status_code == 303 and "HttpOnly" in entered.headers["set-cookie"]
    assert "SameSite=Strict" in entered.headers["set-cookie"]
    assert api.get("/api/info").status_code == 200, "the cookie lets the page in"
    assert not AccessPolicy("0.0.0.0").is_loopback and AccessPolicy("::1").is_loopback


def test_the_command_and_the_server_prove_that_they_know_the_key(api: TestClient):
    def ask(query: bytes, nonce: str, proof: str) -> httpx.Response:
        return api.post(f"/api/command/search?{query.decode()}", headers={NONCE_FIELD: nonce, PROOF_FIELD: proof})

    proof = request_proof(KEY, "1", b"q=red&k=2", b"")
    reply = ask(b"q=red&k=2", "1", proof)
    assert reply.status_code == 200 and reply.content.endswith(b"red")
    assert reply.headers[PROOF_FIELD] == answer_proof(KEY, "1", reply.content)
    wrong = ask(b"q=red+-red", "2", request_proof(KEY, "2", b"q=red+-red", b""))
    assert wrong.status_code == 400 and wrong.headers[PROOF_FIELD] == answer_proof(KEY, "2", wrong.content)
    other = request_proof("another key", "1", b"q=red&k=2", b"")
    refused = [(b"q=red&k=2", "1", ""), (b"q=red&k=2", "1", other), (b"q=red&k=2", "2", proof), (b"q=red", "1", proof)]
    assert {ask(*each).status_code for each in (*refused, (b"q=red", "1", KEY))} == {403}


@pytest.mark.parametrize("name", ["a/b c.png", "caf\udce9.png", "base64:x", "a\nb", "日本.png"], ids=ascii)
def test_ids_survive(name: str):
    given = public_id(name)
    given.encode()
    assert stored_id(given) == name
    with pytest.raises(UserError, match="damaged"):
        stored_id("base64:a")


def test_an_index_that_changes_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clasp.serve.service._RECHECK_SECONDS", 0.0)
    service = toy_service(tmp_path / "x")
    api = TestClient(toy_app(service), LOOPBACK)
    try:
        assert api.get("/api/browse").json()["total"] == 53
        source: Any = service._source
        store = source.open().engine.store
        store.delete([source.pairs[0].id])
        store.close()
        source.version += 1
        assert api.get("/api/browse").json()["total"] == 52 and service.count() == 52
    finally:
        service.close()


def flip_byte(folder: Path, place: int) -> None:
    """Change a byte of the vectors of the index in a folder; a negative place counts from the end."""
    (path,) = (folder / "index").glob("vectors-*")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    with path.open("r+b") as file:  # the same file, as a failing disk changes it
        file.write(data)


def test_a_damaged_index_does_not_replace_the_one_that_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("clasp.serve.service._RECHECK_SECONDS", 0.0)
    service = toy_service(tmp_path / "x")
    api = TestClient(toy_app(service), LOOPBACK)
    try:
        before = api.get("/api/search", params={"q": "red"})
        assert before.status_code == 200
        source: Any = service._source
        store = source.open().engine.store
        store.add(["added"], store.vectors([source.pairs[0].id]), store.metadata([source.pairs[0].id]))
        store.release()
        flip_byte(tmp_path / "x", -1)
        source.version += 1
        assert api.get("/api/search", params={"q": "red"}).json()["hits"] == before.json()["hits"]
        assert service.count() == 53 and "the earlier one is used" in caplog.text
        flip_byte(tmp_path / "x", -1)
        assert api.get("/api/search", params={"q": "red"}).status_code == 200 and service.count() == 54
    finally:
        service.close()


def test_damage_found_while_searching_is_the_servers(tmp_path: Path):
    source = ToyIndex(tmp_path)
    flip_byte(tmp_path, 0)
    verified_matrix._compared.clear()  # a process compares the vectors once
    service = SearchService(source, tmp_path / "thumbnails", LIMITS, ServerMetrics())
    try:
        reply = TestClient(toy_app(service), LOOPBACK).get("/api/search", params={"q": "red"})
        assert reply.status_code == 500 and "is damaged: its checksum is" in reply.json()["error"]
    finally:
        service.close()
