"""Images added and entries deleted by HTTP: durable when answered, all or none, and never a file of somebody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi.testclient import TestClient

from clasp.search.flat_store import FlatStore
from clasp.search.manifest import lock_store
from clasp.serve.editor import IndexEditor
from clasp.serve.guard import AccessPolicy
from clasp.serve.service import SearchService
from clasp.serve.upload_folder import UPLOAD_SUFFIXES, UploadedImage, UploadFolder, upload_name
from clasp.types import UserError
from toydata import COLOURS
from toysearch import png
from toyserver import toy_app, toy_service

LOOPBACK = "http://127.0.0.1:8000"


class Server(NamedTuple):
    """A server whose index may be changed, its files, and the application for another client."""

    api: TestClient
    service: SearchService
    folder: Path
    editor: IndexEditor

    def stored(self) -> dict[str, Any]:
        """What another process would find in the index."""
        return dict(FlatStore(self.folder / "index").scan())

    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "uploads").iterdir())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    service = toy_service(tmp_path)
    editor = IndexEditor(service, UploadFolder(tmp_path / "uploads"))
    yield Server(TestClient(toy_app(service, editor=editor), LOOPBACK), service, tmp_path, editor)
    service.close()


def images(*named: tuple[str, bytes]) -> list[tuple[str, Any]]:
    return [("images", (name, data, "image/png")) for name, data in named]


PURPLE = png(COLOURS["purple"], 5)


def test_an_added_image_is_found_at_once_and_stays(server: Server):
    reply = server.api.post("/api/images", files=images(("Summer 2021/é beach.png", PURPLE)))
    assert reply.status_code == 201, reply.text
    (entry,) = reply.json()["entries"]
    assert entry["id"].startswith("é-beach-") and entry["id"].endswith(".png") and [entry["id"]] == server.saved()
    assert entry["meta"] == {"width": "5", "height": "5", "bytes": str(len(PURPLE))}
    found = server.api.get("/api/search", params={"q": "purple", "k": 1}).json()["hits"][0]
    assert found["id"] == entry["id"] and found["score"] == pytest.approx(1, abs=0.01)
    assert server.api.get(entry["image"]).content == PURPLE
    assert server.api.get("/api/browse", params={"k": 100}).json()["total"] == 54
    stored = server.stored()[entry["id"]]
    assert stored["origins"] == [str(server.folder / "uploads")] and stored["captions"] == []
    assert server.api.get("/api/info").json()["changes"] is True
    again = server.api.post("/api/images", files=images(("é beach.png", PURPLE), ("é beach.png", PURPLE)))
    assert again.status_code == 201 and len(server.stored()) == 54 and server.saved() == [entry["id"]]


def test_all_or_none(server: Server):
    before = server.stored()
    for bad in (b"", b"hello", PURPLE[:40], b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        reply = server.api.post("/api/images", files=images(("a.png", PURPLE), ("b.png", bad)))
        assert reply.status_code == 400 and "cannot be read" in reply.json()["error"]
    many = server.api.post("/api/images", files=images(*[(f"{n}.png", PURPLE) for n in range(9)]))
    assert many.status_code == 400 and "at most 8" in many.json()["error"]
    assert server.api.post("/api/images").status_code == 422
    assert server.api.post("/api/images", data={"images": "text"}).status_code == 422
    assert server.saved() == [] and server.stored() == before


def test_a_deleted_entry_is_gone_and_only_our_files_with_it(server: Server):
    (added,) = server.api.post("/api/images", files=images(("a.png", PURPLE))).json()["entries"]
    assert server.api.get(added["thumbnail"]).status_code == 200
    thumbnails = [path for path in (server.folder / "thumbnails").rglob("*.webp")]
    assert len(thumbnails) == 1
    reply = server.api.delete("/api/image", params={"id": added["id"]})
    assert reply.json() == {"id": added["id"], "file_deleted": True}
    assert server.saved() == [] and not thumbnails[0].exists() and added["id"] not in server.stored()
    for path in ("image", "thumbnail", "similar"):
        assert server.api.get(f"/api/{path}", params={"id": added["id"]}).status_code in (400, 404)
    assert server.api.delete("/api/image", params={"id": added["id"]}).status_code == 404
    indexed = server.api.get("/api/browse", params={"k": 1}).json()["entries"][0]
    reply = server.api.delete("/api/image", params={"id": indexed["id"]})
    assert reply.json()["file_deleted"] is False and Path(indexed["name"]).is_file()
    assert indexed["id"] not in server.stored() and len(server.stored()) == 52
    for name in ("../../etc/passwd", "base64:%%%", "x" * 9000):
        assert server.api.delete("/api/image", params={"id": name}).status_code in (400, 404, 422)


def test_the_last_entry_can_be_deleted(server: Server):
    for name in server.stored():
        assert server.api.delete("/api/image", params={"id": name}).status_code == 200
    assert server.api.get("/api/browse").json()["total"] == 0 and server.service.count() == 0
    assert "nothing has been indexed" in server.api.get("/api/search", params={"q": "red"}).json()["error"]
    assert server.api.post("/api/images", files=images(("a.png", PURPLE))).status_code == 201
    assert len(server.api.get("/api/search", params={"q": "red"}).json()["hits"]) == 1


def test_a_change_neither_reads_nor_copies_the_whole_index(server: Server, monkeypatch: pytest.MonkeyPatch):
    gone = next(iter(server.stored()))
    with monkeypatch.context() as patch:
        for name in ("_load", "_compact"):
            patch.setattr(FlatStore, name, lambda store: pytest.fail("the whole index is read or copied"))
        assert server.api.delete("/api/image", params={"id": gone}).status_code == 200
        assert server.api.post("/api/images", files=images(("a.png", PURPLE))).status_code == 201
        hits = server.api.get("/api/search", params={"q": "red", "k": 100}).json()["hits"]
        ids = {each["id"] for hit in hits for each in (hit, *hit["duplicates"])}
        assert gone not in ids and len(ids) == 53
    assert gone not in server.stored() and len(server.stored()) == 53


def test_another_writer_locks_it_out(server: Server):
    held = FlatStore(server.folder / "index")
    held._begin_write()
    try:
        added = server.api.post("/api/images", files=images(("a.png", PURPLE)))
        deleted = server.api.delete("/api/image", params={"id": next(iter(server.stored()))})
        for reply in (added, deleted):
            assert reply.status_code == 503 and reply.headers["retry-after"] == "5"
            assert "being written to elsewhere" in reply.json()["error"]
        assert server.saved() == [] and len(server.stored()) == 53
    finally:
        held.close()
    assert server.api.post("/api/images", files=images(("a.png", PURPLE))).status_code == 201
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UploadFolder, "save", lambda folder, image: (_ for _ in ()).throw(OSError(28, "No space left")))
        full = server.api.post("/api/images", files=images(("b.png", PURPLE)))
    assert full.status_code == 503 and full.json()["error"] == "1 image not added: No space left"
    lock = lock_store(server.folder / "index")  # nothing of the server's holds it any more
    os.close(lock)


def test_many_at_once(server: Server):
    def add(number: int) -> int:
        data = png((number, 255 - number, 128), 4)
        return server.api.post("/api/images", files=images((f"{number}.png", data))).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(add, range(24))) == {201}
    assert len(server.stored()) == 53 + 24 == server.service.count() and len(server.saved()) == 24


def test_without_a_folder_nothing_changes(server: Server):
    closed = TestClient(toy_app(server.service), LOOPBACK)
    assert closed.get("/api/info").json()["changes"] is False
    for reply in (
        closed.post("/api/images", files=images(("a.png", PURPLE))),
        closed.delete("/api/image", params={"id": "a"}),
    ):
        assert reply.status_code == 403 and "--uploads FOLDER" in reply.json()["error"]


def test_the_token_and_the_origin_are_asked_for(server: Server):
    policy = AccessPolicy("0.0.0.0", "sesame", ("pictures.example",))
    api = TestClient(toy_app(server.service, policy, server.editor), "http://pictures.example")
    name = next(iter(server.stored()))
    assert api.post("/api/images", files=images(("a.png", PURPLE))).status_code == 401
    assert api.delete("/api/image", params={"id": name}).status_code == 401
    foreign = {"authorization": "Bearer sesame", "origin": "http://evil.example"}
    assert api.delete("/api/image", params={"id": name}, headers=foreign).status_code == 403
    own = {"authorization": "Bearer sesame"}
    assert api.delete("/api/image", params={"id": name}, headers=own).status_code == 200


# --- the folder ------------------------------------------------------------------------------------------------------

NAMES = {
    "a.png": "a",
    "../../../etc/passwd": "passwd",
    "C:\\Users\\me\\b c.JPG": "b-c",
    "\x00\x1b[31m.png": "31m",
    "...": "image",
    "": "image",
    "日本.jpg": "日本",
    "x" * 300: "x" * 40,
    "-rf.png": "rf",
    "caf\udce9.png": "caf",
}


@pytest.mark.parametrize("given", NAMES, ids=ascii)
def test_names_of_files(given: str, tmp_path: Path):
    image = UploadedImage(b"data", given, "image/jpeg", "0123456789abcdef" * 4)
    assert upload_name(image) == f"{NAMES[given]}-0123456789ab.jpg"
    folder = UploadFolder(tmp_path)
    first, second = folder.save(image), folder.save(image)
    assert (
        first.path == second.path
        and first.path.parent == folder.path
        and (first.is_new, second.is_new) == (True, False)
    )
    assert set(UPLOAD_SUFFIXES.values()) == {".jpg", ".png", ".webp", ".gif", ".bmp", ".tif"}


def test_a_file_of_somebody_else_is_not_deleted(tmp_path: Path):
    folder, sha256 = UploadFolder(tmp_path / "uploads"), "0123456789abcdef" * 4
    theirs = [folder.path / "holiday.jpg", tmp_path / "a-0123456789ab.jpg", folder.path / "sub" / "a-0123456789ab.jpg"]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        assert not folder.delete(str(path), sha256) and path.exists()
    (folder.path / "out").symlink_to(tmp_path)
    assert not folder.delete(str(folder.path / "out" / "a-0123456789ab.jpg"), sha256) and theirs[1].exists()
    with pytest.raises(UserError, match=r"--uploads .*: cannot make this folder"):
        UploadFolder(theirs[0] / "x")
