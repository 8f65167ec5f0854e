"""Shards on a web server that drops, stalls and corrupts: fetched again, compared, evicted; errors name them."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from clasp.config.datasets import open_training_pairs
from clasp.config.recipe import read_recipe
from clasp.data import shard_download, shard_stage, shard_windows
from clasp.data.loader import BatchReader, PairLoader
from clasp.data.pairs import Pairs, open_pairs, split_by_group
from clasp.data.readers import LiveImageReader, LiveTextReader, PairIndex
from clasp.data.shard_stage import ShardError, ShardStage, StagedShard
from clasp.search.entries import StoredEntries, build_entries
from clasp.types import UserError
from toydata import toys, write_shards, write_tar
from toypairs import TRANSFORM, word_tokenizer

TOYS = toys(24, seed=4)


@dataclass
class Store:
    """Files at addresses, and what goes wrong with the next downloads."""

    folder: Path
    address: str = ""
    faults: list[str] = field(default_factory=list)
    """Of the next GETs, in order: drop, stall, corrupt, short, error 500 …"""
    tags: bool = True
    seen: Counter[str] = field(default_factory=Counter)
    """How often each file was downloaded"""
    release: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A web server of the shards of 24 pairs, six in each."""
    (tmp_path / "served").mkdir()
    write_shards(TOYS, tmp_path / "served", shards=4)
    made = Store(tmp_path / "served")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, send: bool) -> None:
            file = made.folder / self.path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            data, fault = file.read_bytes(), ""
            if send:
                made.seen[file.name] += 1
                fault = made.faults.pop(0) if made.faults else ""
            if fault.startswith("error"):
                self.send_error(int(fault.split()[1]))
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) - 512 * (fault == "short")))
            if made.tags:
                self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
            self.end_headers()
            if fault == "stall":
                self.wfile.write(data[:1000])
                self.wfile.flush()
                made.release.wait(20)
            elif send:
                if fault == "corrupt":
                    at = 700 + made.seen.total()  # another byte each time
                    data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                self.wfile.write(data[: 1000 if fault == "drop" else len(data) - 512 * (fault == "short")])

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    made.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(shard_stage, "WAITS_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(shard_download, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield made
    made.release.set()
    server.shutdown()
    server.server_close()


def shards(store: Store) -> str:
    names = sorted(file.name for file in store.folder.glob("*.tar"))
    return "::".join(f"{store.address}/{name}" for name in names)


def opened(store: Store, cache: Path, most: int = 10**9) -> Pairs:
    return open_pairs(shards(store), cache=cache / "pairs", stage=ShardStage(cache / "shards", most))


def test_pairs_are_those_of_the_files_and_an_opened_shard_is_not_fetched_again(store: Store, tmp_path: Path):
    here = open_pairs("::".join(sorted(map(str, store.folder.glob("*.tar")))))
    there = opened(store, tmp_path)
    assert [(p.id, p.captions, p.group, p.image.read()) for p in there] == [
        (p.id, p.captions, p.group, p.image.read()) for p in here
    ]
    assert set(store.seen.values()) == {1} and len(store.seen) == 4
    for file in (tmp_path / "shards").glob("*.shard"):
        file.unlink()
    store.seen.clear()
    again = opened(store, tmp_path)
    assert [pair.captions for pair in again] == [pair.captions for pair in here] and not store.seen
    assert again.version == there.version and PairIndex(again).texts[:] == PairIndex(here).texts[:]
    assert again[0].image.read() == here[0].image.read() and store.seen.total() == 1


@pytest.mark.parametrize("fault", ["drop", "stall", "corrupt", "short", "error 500", "error 503"])
def test_a_failed_download_is_tried_again(fault: str, store: Store, tmp_path: Path):
    store.faults = [fault, fault]
    there = opened(store, tmp_path)
    assert len(there) == len(TOYS) and store.seen.total() == 6
    assert there[0].image.read() == TOYS[0].png
    assert not [file for file in (tmp_path / "shards").iterdir() if ".part" in file.name]


@pytest.mark.parametrize(
    "fault, wanted",
    [
        ("drop", "3 attempts"),
        ("stall", "timed out"),
        ("short", "bytes came, of"),
        ("error 503", "HTTP 503"),
        ("error 404", "HTTP 404"),
    ],
)
def test_one_that_goes_on_failing_is_named(fault: str, wanted: str, store: Store, tmp_path: Path):
    store.faults = [fault] * 30
    with pytest.raises(UserError, match=wanted) as told:
        opened(store, tmp_path)
    first = shards(store).partition("::")[0].rpartition("/")[2]
    assert f"{first} cannot be read" in str(told.value) and "\n" not in str(told.value)


def test_bytes_that_change_under_one_tag_are_refused(store: Store, tmp_path: Path):
    store.tags = False
    there = opened(store, tmp_path)
    for file in (tmp_path / "shards").glob("*.shard"):
        file.unlink()
    store.faults = ["corrupt"] * 30
    with pytest.raises(UserError, match="not those it had when it was first read"):
        there[0].image.read()
    store.faults = []
    assert there[0].image.read() == TOYS[0].png


def test_a_replaced_shard_is_indexed_anew(store: Store, tmp_path: Path):
    before = opened(store, tmp_path)
    write_tar(toys(30, seed=9)[24:], next(iter(sorted(store.folder.glob("*.tar")))))
    after = opened(store, tmp_path)
    assert [pair.id for pair in after][:6] != [pair.id for pair in before][:6]
    assert [pair.id for pair in after][6:] == [pair.id for pair in before][6:]
    for file in (tmp_path / "shards").glob("*.shard"):
        file.unlink()
    with pytest.raises(UserError, match=r"\.tar cannot be read: it was replaced after its pairs were opened"):
        before[0].image.read()


def test_a_storage_that_refuses_ends_the_run_and_skips_no_sample(store: Store, tmp_path: Path):
    first = opened(store, tmp_path)[0]
    for file in (tmp_path / "shards").glob("*.shard"):
        file.unlink()
    store.faults = ["error 403"]
    with pytest.raises(ShardError, match=rf"{store.address}/.*\.tar cannot be read: HTTP 403"):
        LiveImageReader(TRANSFORM).decode([(first.id, first.image, 0)])


def test_what_a_killed_download_left_is_deleted(store: Store, tmp_path: Path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0a.shard.77.part").write_bytes(b"half")
    opened(store, tmp_path)
    assert not list((tmp_path / "shards").glob("*.part"))


def test_any_error_of_a_storage_package_is_an_attempt_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def no_credentials(address: str) -> None:
        raise RuntimeError("no\ncredentials")

    monkeypatch.setattr(shard_download, "_file_system", no_credentials)
    with pytest.raises(shard_download.ShardNotReadError, match=r"^RuntimeError: no credentials$"):
        shard_download.describe_object("s3://bucket/a.tar")
    here = shard_download.RemoteObject("ftp:/unknown", 1, "")
    some = [StagedShard(ShardStage(tmp_path, 10), here), StagedShard(ShardStage(tmp_path, 11), here)]
    shard_stage._in_background.update(some)
    with pytest.raises(RuntimeError):
        monkeypatch.setattr(StagedShard, "fetch", no_credentials)
        shard_stage._fetch_all(some)
    assert not shard_stage._in_background.intersection(some)


@pytest.mark.parametrize("ours", [True, False])
def test_the_md5_of_googles_storage_is_compared(ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = b"a tar" if ours else b"damaged"

    class Bucket:
        def info(self, path: str) -> dict[str, object]:
            digest = hashlib.md5(b"a tar").digest()
            return {"size": len(data), "etag": "CJDz", "md5Hash": base64.b64encode(digest).decode()}

        def open(self, path: str, mode: str) -> io.BytesIO:
            return io.BytesIO(data)

    monkeypatch.setattr(shard_download, "_file_system", lambda address: (Bucket(), address))
    monkeypatch.setattr(shard_stage, "WAITS_SECONDS", ())
    shard = StagedShard(ShardStage(tmp_path, 100), shard_download.describe_object("gs://bucket/a.tar"))
    assert shard.remote.tag == "CJDz" and shard.remote.md5 == hashlib.md5(b"a tar").hexdigest()
    if ours:
        assert shard.fetch().read_bytes() == data
    else:
        with pytest.raises(ShardError, match="do not have the MD5"):
            shard.fetch()


# --- the limit -------------------------------------------------------------------------------------------------------


def test_the_stage_keeps_its_limit_and_each_epoch_fetches_each_shard_once(store: Store, tmp_path: Path):
    size = max(file.stat().st_size for file in store.folder.glob("*.tar"))
    there = opened(store, tmp_path, most=2 * size)
    store.seen.clear()
    reader = BatchReader(there, LiveImageReader(TRANSFORM), LiveTextReader(word_tokenizer()))
    loader = PairLoader(reader, batch_size=3, seed=1)
    part = dict(zip([pair.id for pair in there], there.parts_of(np.arange(24)).tolist(), strict=True))
    orders = []
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        assert not any(batch.skipped for batch in batches)
        orders.append([id for batch in batches for id in batch.ids])
        visited = [part[id] for id in orders[-1]]
        assert sorted(visited[::6]) == [0, 1, 2, 3] and visited == sorted(visited, key=visited.index)
        staged = [file.stat().st_size for file in (tmp_path / "shards").glob("*.shard")]
        assert sum(staged) <= 2 * size
    assert orders[0] != orders[1] and set(orders[0]) == set(part) and max(store.seen.values()) <= 3
    late = PairLoader(reader, batch_size=3, seed=1).epoch(1, start=5)
    assert [id for batch in late for id in batch.ids] == orders[1][15:]
    with pytest.raises(UserError, match=r"data.stage_gb = .* holds fewer than two such shards"):
        opened(store, tmp_path, most=2 * size - 1)


def test_the_shards_in_use_are_fetched_before_the_next(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    size = max(file.stat().st_size for file in store.folder.glob("*.tar"))
    there = opened(store, tmp_path, most=2 * size)
    asked: list[list[StagedShard]] = []
    monkeypatch.setattr(shard_windows, "fetch_in_background", asked.append)
    reader = BatchReader(there, LiveImageReader(TRANSFORM), LiveTextReader(word_tokenizer()))
    order = PairLoader(reader, batch_size=3, seed=1)._sample_indices(0, 0)
    first = there.shards[int(there.parts_of(next(order).pair)[0])]
    assert asked[0][0] == first and len(asked[0]) == 2


def test_shards_that_fit_are_shuffled_as_files_are(store: Store, tmp_path: Path):
    here = open_pairs("::".join(sorted(map(str, store.folder.glob("*.tar")))))

    def order(pairs: Pairs) -> list[tuple[str, ...]]:
        reader = BatchReader(pairs, LiveImageReader(TRANSFORM), LiveTextReader(word_tokenizer()))
        return [batch.ids for batch in PairLoader(reader, batch_size=5, seed=3).epoch(2)]

    assert order(opened(store, tmp_path)) == order(here)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_before_the_recipe_is_checked(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="stage_gb"):
        read_recipe("start", [f"data.train={shards(store)}", "data.stage_gb=0"])
    made = read_recipe("start", [f"data.train={shards(store)}"])
    assert not store.seen
    train, val = open_training_pairs(made)
    assert len(train) + len(val) == 24 and store.seen.total() == 4
    assert [pair.id for pair in val] == [pair.id for pair in split_by_group(opened(store, tmp_path), 0.1)[1]]


def test_other_addresses_are_refused_unread(store: Store, tmp_path: Path):
    stage = ShardStage(tmp_path / "shards", 10**9)
    for source, wanted in (
        (f"{store.address}/pairs.csv", "is an address, and only .tar shards"),
        ("ftp://example.org/a.tar", re.escape("shards are read from http, https, s3")),
        (f"{store.address}/a.tar::{tmp_path}", "is an address"),
    ):
        with pytest.raises(UserError, match=wanted):
            open_pairs(source, stage=stage)
    with pytest.raises(UserError, match="is an address, and nothing is downloaded"):
        open_pairs(f"{store.address}/a.tar")
    assert not store.seen


def test_images_of_a_storage_are_not_indexed(store: Store, tmp_path: Path):
    with pytest.raises(UserError, match=r"tar::.* is on object storage"):
        build_entries(opened(store, tmp_path), StoredEntries([]))


def test_the_package_of_a_storage_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"s3://bucket/a\.tar needs a package for s3://.*s3fs"):
        open_pairs("s3://bucket/a.tar", stage=ShardStage(tmp_path, 10**9))
