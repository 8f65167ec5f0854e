"""FlatStore: exact against an obvious search, ties by id, and nothing lost to kills, full disks or other writers."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from clasp.search import verified_matrix
from clasp.search.flat_store import FlatStore
from clasp.types import Hit, Store, UserError


def vectors(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float32)


def few(folder: Path) -> FlatStore:
    """East, north, and north-east; the last is not of unit length."""
    store = FlatStore(folder)
    store.add(["east", "north", "both"], vectors((1, 0), (0, 1), (2, 2)), [{"n": 1}, {"n": 2}, {"n": 3}])
    return store


def found(store: FlatStore, *query: float, k: int = 10) -> list[tuple[str, float]]:
    return [(hit.id, round(hit.score, 4)) for hit in store.search(vectors(query), k)[0]]


def obvious(ids, rows, meta, query, k, where=lambda meta: True) -> list[tuple[str, float]]:
    """Every cosine by itself, then one sort."""
    scored = []
    for name, row, about in zip(ids, rows.astype(np.float64), meta, strict=True):
        if where(about):
            cosine = sum((row * query.astype(np.float64)).tolist()) / (
                float(np.linalg.norm(row)) * float(np.linalg.norm(query))
            )
            scored.append((name, cosine))
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:k]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".f32", ".jsonl"))


# --- right answers ---------------------------------------------------------------------------------------------------


def test_nearest_by_cosine_with_metadata(tmp_path: Path):
    store = few(tmp_path / "store")
    assert isinstance(store, Store)
    assert store.search(vectors((3, 0)), 1) == [[Hit("east", 1.0, {"n": 1})]]
    assert found(store, 0, 1) == [("north", 1.0), ("both", 0.7071), ("east", 0.0)]
    both = store.search(vectors((1, 0), (0, 1)), 1)
    assert [[hit.id for hit in hits] for hits in both] == [["east"], ["north"]]


@pytest.mark.parametrize("kinds", [3, 10_000])  # of 3 kinds nearly all are ties
def test_as_the_obvious_search(tmp_path: Path, kinds: int):
    chance = np.random.default_rng(kinds)
    rows = chance.standard_normal((kinds, 4), np.float32)[chance.integers(0, kinds, 600)]
    rows = rows * np.float32(2) ** chance.integers(-3, 4, (600, 1)).astype(np.float32)  # a length that no cosine sees
    ids = [f"{number:x}" for number in chance.permutation(600)]
    meta = [{"n": int(number)} for number in chance.integers(0, 5, 600)]
    store = FlatStore(tmp_path / "store")
    for start in range(0, 600, 150):
        part = slice(start, start + 150)
        store.add(ids[part], rows[part], meta[part])
    gone = {ids[number] for number in range(0, 600, 7)}
    assert store.delete(gone) == len(gone)
    left = [number for number in range(600) if ids[number] not in gone]
    ids, rows, meta = [ids[n] for n in left], rows[left], [meta[n] for n in left]
    queries = chance.standard_normal((5, 4), np.float32)
    for where in (lambda meta: True, lambda meta: meta["n"] == 3):
        for k in (1, 10, 100, 1000):
            for query, hits in zip(queries, store.search(queries, k, where), strict=True):
                expected = obvious(ids, rows, meta, query, k, where)
                assert [hit.id for hit in hits] == [name for name, _ in expected]
                assert [hit.score for hit in hits] == pytest.approx([cosine for _, cosine in expected], abs=1e-6)


def test_many_queries_are_answered_as_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = FlatStore(tmp_path / "store")
    rows = np.random.default_rng(0).standard_normal((50, 8), np.float32)
    store.add([str(number) for number in range(50)], rows, [{}] * 50)
    together = store.search(rows[:7], 5)
    monkeypatch.setattr("clasp.search.flat_store._SCORES_AT_ONCE", 100)  # two queries at a time
    assert store.search(rows[:7], 5) == together
    assert [store.search(rows[number : number + 1], 5)[0] for number in range(7)] == together
    assert [hits[0].id for hits in together] == [str(number) for number in range(7)]


def test_equal_vectors_come_in_the_order_of_their_ids_wherever_they_stand(tmp_path: Path):
    # a collapsed model: 5000 equal vectors among which a BLAS product tells apart by the last bit
    chance = np.random.default_rng(1)
    one = chance.standard_normal((1, 67), np.float32)
    ids = [f"{number:04}" for number in chance.permutation(5000)]
    store = FlatStore(tmp_path / "store")
    store.add(ids, one.repeat(5000, axis=0), [{}] * 5000)
    hits = store.search(chance.standard_normal((1, 67), np.float32), 20)[0]
    assert [hit.id for hit in hits] == [f"{number:04}" for number in range(20)]
    assert len({hit.score for hit in hits}) == 1


def test_the_filter_is_asked_of_the_best_only(tmp_path: Path):
    store = FlatStore(tmp_path / "store")
    angles = np.linspace(0, 1.5, 2000, dtype=np.float32)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    store.add([str(number) for number in range(2000)], rows, [{"n": number} for number in range(2000)])
    asked = []
    hits = store.search(vectors((1, 0)), 3, lambda meta: asked.append(meta["n"]) or meta["n"] % 2 == 1)[0]
    assert [hit.id for hit in hits] == ["1", "3", "5"]
    assert len(asked) < 100
    assert [hit.id for hit in store.search(vectors((1, 0)), 3, lambda meta: meta["n"] > 1500)[0]] == [
        "1501",
        "1502",
        "1503",
    ]
    assert store.search(vectors((1, 0)), 3, lambda meta: False) == [[]]


def test_no_hits_and_more_than_there_are(tmp_path: Path):
    assert FlatStore(tmp_path / "nothing").search(vectors((1, 0)), 5) == [[]]
    store = few(tmp_path / "store")
    assert store.search(vectors((1, 0), (0, 1)), 0) == [[], []]
    assert len(store.search(vectors((1, 0)), 1000)[0]) == 3
    assert store.search(np.empty((0, 2), np.float32), 5) == []


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tidy", ["closed", "dropped"])
def test_adding_replaces_and_deleting_forgets_and_both_last(tmp_path: Path, tidy: str):
    store = few(tmp_path / "store")
    store.add(["east", "south"], vectors((-1, 0), (0, -1)), [{"n": 4}, {"n": 5}])
    assert store.count() == 4
    assert store.delete(["north", "north", "nowhere"]) == 1
    assert store.delete(["north"]) == 0
    if tidy == "closed":
        store.close()
    for opened in (store, FlatStore(tmp_path / "store")):
        assert opened.count() == 3
        assert found(opened, 0, 1) == [("both", 0.7071), ("east", 0.0), ("south", -1.0)]
        assert found(opened, -1, 0)[0] == ("east", 1.0)
        assert dict(opened.scan()) == {"east": {"n": 4}, "south": {"n": 5}, "both": {"n": 3}}
        assert np.array_equal(opened.vectors(["south", "east"]), vectors((0, -1), (-1, 0)))
    again = FlatStore(tmp_path / "store") if tidy == "closed" else store
    again.add(["north"], vectors((0, 1)), [{"n": 2}])
    assert FlatStore(tmp_path / "store").count() == 4


def test_a_small_change_of_a_large_store_is_not_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clasp.search.flat_store._FEW_DEAD_ROWS", 1)
    few(tmp_path / "store").close()
    read = FlatStore(tmp_path / "store")
    other = FlatStore(tmp_path / "store")
    other.add(["west"], vectors((-1, 0)), [{"n": 4}])
    other.close()
    first = read.fork()
    assert first.delete(["both"]) == 1  # what another process has added since it was read is not lost
    first.release()
    before = size(tmp_path / "store")
    assert read.count() == 3 and len(found(read, 1, 1)) == 3, "what is being searched stays"
    second = first.fork()
    second.delete(["north"])
    second.release()
    for opened in (second, FlatStore(tmp_path / "store")):
        assert found(opened, 1, 0) == [("east", 1.0), ("west", -1.0)]
    assert found(first, 1, 0) == [("east", 1.0), ("north", 0.0), ("west", -1.0)]
    assert size(tmp_path / "store") < before, "two dead rows of four are many here"
    assert FlatStore(tmp_path / "store").delete(["west"]) == 1  # nobody holds the lock


def test_of_one_id_given_twice_the_last_holds(tmp_path: Path):
    store = FlatStore(tmp_path / "store")
    store.add(["a", "a"], vectors((1, 0), (0, 1)), [{"n": 1}, {"n": 2}])
    assert store.search(vectors((0, 1)), 9) == [[Hit("a", 1.0, {"n": 2})]]


def test_close_takes_back_the_space(tmp_path: Path):
    store = few(tmp_path / "store")
    before = size(tmp_path / "store")
    for _ in range(5):
        store.add(["east"], vectors((1, 0)), [{"n": 1}])
    assert size(tmp_path / "store") > before
    store.close()
    assert size(tmp_path / "store") == before
    assert len(list((tmp_path / "store").iterdir())) == 4  # manifest, vectors, rows, lock
    assert found(FlatStore(tmp_path / "store"), 1, 0) == [("east", 1.0), ("both", 0.7071), ("north", 0.0)]


def test_emptied_it_may_begin_anew_with_another_width(tmp_path: Path):
    store = few(tmp_path / "store")
    assert store.delete(["east", "north", "both"]) == 3
    assert store.search(vectors((1, 0)), 5) == [[]]
    store.add(["a"], vectors((1, 0, 0)), [{}])
    assert found(FlatStore(tmp_path / "store"), 1, 0, 0) == [("a", 1.0)]
    store.clear()
    assert (store.count(), FlatStore(tmp_path / "store").count()) == (0, 0)
    store.close()
    assert size(tmp_path / "store") == 0


def test_ids_and_metadata_of_any_kind_come_back(tmp_path: Path):
    ids = ["", 'a "quoted"\\ id', "two\nlines\u2028", "ድመት 🐈", "bad\udcff.jpg", '", "deleted": true}']
    meta = [{"text": name, "deep": [1, None, {"x": 1.5}]} for name in ids]
    store = FlatStore(tmp_path / "store")
    store.add(ids, np.eye(6, dtype=np.float32), meta)
    store.close()
    assert list(FlatStore(tmp_path / "store").scan()) == list(zip(ids, meta, strict=True))


def test_opening_and_searching_write_nothing(tmp_path: Path):
    FlatStore(tmp_path / "none").search(vectors((1, 0)), 1)
    FlatStore(tmp_path / "none").close()
    assert not (tmp_path / "none").exists()
    few(tmp_path / "store").close()
    os.chmod(tmp_path / "store", 0o500)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    store = FlatStore(tmp_path / "store")
    assert found(store, 1, 0, k=1) == [("east", 1.0)]
    store.close()
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    os.chmod(tmp_path / "store", 0o700)


# --- kills, full disks, others ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def test_a_kill_at_any_point_leaves_the_store_before_or_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = [("east", 1.0), ("both", 0.7071), ("north", 0.0)]
    steps = {
        "add": (lambda store: store.add(["east", "west"], vectors((0, 1), (-1, 0)), [{}, {}]),
                [("both", 0.7071), ("east", 0.0), ("north", 0.0), ("west", -1.0)]),
        "delete": (lambda store: store.delete(["both"]), [("east", 1.0), ("north", 0.0)]),
        "close": (lambda store: store.close(), before),
        "clear": (lambda store: store.clear(), []),
    }  # fmt: skip
    outcomes = set()
    for step, (act, after) in steps.items():
        for moment in range(12):
            folder = tmp_path / f"{step}-{moment}"
            store = few(folder)
            store.add(["gone"], vectors((1, 0)), [{}])
            store.delete(["gone"])
            calls = 0

            def killing(call, moment=moment):
                def killed(*arguments, **named):
                    nonlocal calls
                    calls += 1
                    if calls > moment:
                        raise Killed
                    return call(*arguments, **named)

                return killed

            with monkeypatch.context() as patch:
                for name in ("fsync", "replace", "open", "unlink", "truncate"):
                    patch.setattr(os, name, killing(getattr(os, name)))
                try:
                    act(store)
                    outcomes.add((step, "survived"))
                except Killed:
                    outcomes.add((step, "killed"))
            del store
            opened = FlatStore(folder)
            assert found(opened, 1, 0) in (before, after), (step, moment)
            opened.add(["north-west"], vectors((-1, 1)), [{}])  # and it can be gone on with
            opened.close()
            assert ("north-west", -0.7071) in found(FlatStore(folder), 1, 0)
    assert outcomes == {(step, end) for step in steps for end in ("survived", "killed")}


def test_a_real_kill_while_adding(tmp_path: Path):
    script = f"""
import numpy as np
from clasp.search.flat_store import FlatStore
store = FlatStore({str(tmp_path / "store")!r})
for number in range(100_000):
    store.add([f"{{number}}-{{n}}" for n in range(20)], np.ones((20, 16), np.float32), [{{"n": number}}] * 20)
    print(number, flush=True)
"""
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | paths)
    with child:
        assert child.stdout is not None
        while int(child.stdout.readline()) < 10:
            pass
        child.kill()
        said = [int(line) for line in child.stdout if line.endswith(b"\n")]
    store = FlatStore(tmp_path / "store")
    assert store.count() % 20 == 0
    assert store.count() >= 20 * (max(said, default=10) + 1)
    store.add(["more"], np.ones((1, 16), np.float32), [{}])


def test_what_a_kill_left_behind_is_cut_off(tmp_path: Path):
    few(tmp_path / "store").close()
    before = size(tmp_path / "store")
    for path in (tmp_path / "store").glob("*-1.*"):
        path.write_bytes(path.read_bytes() + b"half a row" * 100)
    (tmp_path / "store" / "manifest.json.part").write_text("half a manifest" * 100)
    (tmp_path / "store" / "rows-0.jsonl").write_text("an older generation")
    store = FlatStore(tmp_path / "store")
    store.add(["west"], vectors((-1, 0)), [{}])
    store.delete(["west"])
    store.close()
    assert size(tmp_path / "store") == before
    assert FlatStore(tmp_path / "store").count() == 3


@contextmanager
def files_of_at_most(bytes_: int):
    """The operating system refuses to let a file grow further, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_the_disk_refuses_half_way_leaves_no_trace(tmp_path: Path):
    store = few(tmp_path / "store")
    before = size(tmp_path / "store")
    with files_of_at_most(1000), pytest.raises(UserError, match=r"cannot write 500 entries: .*unchanged"):
        store.add([str(number) for number in range(500)], np.ones((500, 2), np.float32), [{}] * 500)
    assert size(tmp_path / "store") == before
    assert found(store, 1, 0) == found(FlatStore(tmp_path / "store"), 1, 0)
    store.add(["west"], vectors((-1, 0)), [{}])
    assert FlatStore(tmp_path / "store").count() == 4


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = few(tmp_path / "store")
    store.delete(["north"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left on the disk"):
            store.add(["west"], vectors((-1, 0)), [{}])
        store.close()  # there is no room to tidy up in, which is no reason to fail
    assert found(FlatStore(tmp_path / "store"), 1, 0) == [("east", 1.0), ("both", 0.7071)]
    assert len(list((tmp_path / "store").glob("*.f32"))) == 1


def test_one_writer_at_a_time(tmp_path: Path):
    first = few(tmp_path / "store")
    second = FlatStore(tmp_path / "store")
    with pytest.raises(UserError, match="being written to elsewhere"):
        second.add(["west"], vectors((-1, 0)), [{}])
    first.add(["south"], vectors((0, -1)), [{}])
    first.delete(["east"])
    first.close()
    assert found(second, 1, 0, k=1) == [("east", 1.0)]  # as it was when opened, though those files are gone
    second.add(["west"], vectors((-1, 0)), [{}])  # sees what the first wrote
    assert sorted(name for name, _ in second.scan()) == ["both", "north", "south", "west"]


def test_a_store_that_is_dropped_without_closing_lets_others_write(tmp_path: Path):
    few(tmp_path / "store")
    FlatStore(tmp_path / "store").add(["west"], vectors((-1, 0)), [{}])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_damaged_files_are_refused_in_one_line(tmp_path: Path):
    few(tmp_path / "store").close()
    contents = {path: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    (vectors_path,) = (path for path in contents if path.suffix == ".f32")
    (rows_path,) = (path for path in contents if path.suffix == ".jsonl")
    manifest_path = tmp_path / "store" / "manifest.json"
    rows, manifest = contents[rows_path], json.loads(contents[manifest_path])
    attacks = [
        (vectors_path, contents[vectors_path][:-1], "is cut short: 23 bytes, not 24"),
        (vectors_path, b"", "is cut short: 0 bytes, not 24"),
        (vectors_path, None, "is missing"),
        (rows_path, rows[:-5], "is cut short or not of this store"),
        (rows_path, rows[: rows.index(b"\n") + 1], "is cut short or not of this store: 1 rows"),
        (rows_path, b"\0" * len(rows), "is damaged at byte 0"),
        (rows_path, None, "is missing"),
        (manifest_path, b"", "is damaged or of another clasp"),
        (manifest_path, b"[]", "is damaged or of another clasp"),
        (manifest_path, json.dumps(manifest | {"format": 2}).encode(), "is damaged or of another clasp"),
        (manifest_path, json.dumps(manifest | {"rows": -1}).encode(), "is damaged or of another clasp"),
    ]
    for path, content, message in attacks:
        for other, intact in contents.items():
            other.write_bytes(intact)
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            FlatStore(tmp_path / "store")
        assert str(path) in str(caught.value)
        assert "clasp index RUN FOLDER" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["vectors-1.f32", "rows-1.jsonl"])
def test_every_flipped_bit_of_vectors_and_metadata_is_named(tmp_path: Path, kind: str):
    store = few(tmp_path / "store")
    store.delete(["north"])
    store.close()  # compacted: what is written then has checksums of its own
    (path,) = (tmp_path / "store").glob(kind.replace("1", "*"))
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        verified_matrix._compared.clear()  # a process compares the vectors once
        with pytest.raises(UserError, match=re.escape(str(path))):
            FlatStore(tmp_path / "store").search(vectors((1, 0)), 1)


def test_a_block_of_the_matrix_is_compared_when_it_is_first_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, read = FlatStore(tmp_path / "store"), []
    for start in (0, 6000):  # across the ends of blocks, of 4096 rows
        ids = [str(number) for number in range(start, start + 6000)]
        store.add(ids, np.ones((6000, 2), np.float32), [{}] * 6000)
    crc32 = verified_matrix.zlib.crc32

    def counted(data: memoryview, before: int = 0) -> int:
        read.append(memoryview(data).nbytes)
        return crc32(data, before)

    opened = FlatStore(tmp_path / "store")
    monkeypatch.setattr(verified_matrix.zlib, "crc32", counted)
    opened.vectors(["5000", "8191"])
    assert read == [8 * 4096]
    opened.search(vectors((1, 0)), 1)
    assert read[1:] == [8 * 4096, 8 * (12000 - 2 * 4096)]
    opened.search(vectors((1, 0)), 1)
    store.add(["west"], vectors((-1, 0)), [{}])
    read.clear()
    grown = FlatStore(tmp_path / "store")
    read.clear()  # the log
    assert grown.search(vectors((-1, 0)), 1)[0][0].id == "west" and read == [8 * (12001 - 2 * 4096)]
    store.close()
    (path,) = (tmp_path / "store").glob("vectors-*")
    with path.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\0")
    verified_matrix._compared.clear()
    damaged = FlatStore(tmp_path / "store")
    assert damaged.vectors(["0", "11999"]).shape == (2, 2)
    damaged.delete(["0"])
    for refused in (lambda: damaged.vectors(["4096"]), lambda: damaged.search(vectors((1, 0)), 1), damaged.close):
        with pytest.raises(UserError, match=re.escape(f"{path} is damaged: its checksum is ")):
            refused()
    FlatStore(tmp_path / "store").add(["south"], vectors((0, -1)), [{}])  # nothing was lost, and nothing is locked
    assert FlatStore(tmp_path / "store").count() == 12001 and list((tmp_path / "store").glob("vectors-*")) == [path]


def test_a_store_with_one_checksum_for_all_vectors_is_read_and_written_on(tmp_path: Path):
    few(tmp_path / "store").close()
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    (sum_of_all,) = manifest.pop("block_checksums")
    path.write_text(json.dumps(manifest | {"vectors_checksum": sum_of_all}))
    (matrix,) = (tmp_path / "store").glob("vectors-*")
    whole = matrix.read_bytes()
    verified_matrix._compared.clear()
    matrix.write_bytes(whole[:-1] + b"\1")
    store = FlatStore(tmp_path / "store")
    for read in (lambda: store.search(vectors((1, 0)), 1), lambda: store.delete(["north"])):
        with pytest.raises(UserError, match="is damaged"):
            read()
    store.close()
    matrix.write_bytes(whole)
    FlatStore(tmp_path / "store").add(["west"], vectors((-1, 0)), [{}])
    manifest = json.loads(path.read_text())
    assert manifest["vectors_checksum"] is None and len(manifest["block_checksums"]) == 1
    assert FlatStore(tmp_path / "store").search(vectors((-1, 0)), 1)[0][0].id == "west"


def test_a_store_of_an_earlier_version_has_no_checksums_until_it_is_written_anew(tmp_path: Path):
    few(tmp_path / "store").close()
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in manifest.items() if "checksum" not in key}))
    store = FlatStore(tmp_path / "store")
    store.add(["west"], vectors((-1, 0)), [{}])
    assert json.loads(path.read_text())["rows_checksum"] is None
    store.delete(["west"])
    store.close()
    assert json.loads(path.read_text())["rows_checksum"] is not None and FlatStore(tmp_path / "store").count() == 3


def test_a_folder_of_something_else_is_not_written_into(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"photos is not a store: it has no manifest\.json, but cat\.jpg"):
        FlatStore(tmp_path / "photos")
    with pytest.raises(UserError, match="is a file"):
        FlatStore(tmp_path / "photos" / "cat.jpg")


def test_vectors_without_direction_and_of_another_width(tmp_path: Path):
    store = few(tmp_path / "store")
    for bad in ((0.0, 0.0), (float("nan"), 1.0), (float("inf"), 1.0)):
        with pytest.raises(UserError, match="'west' is zero or not finite"):
            store.add(["good", "west"], vectors((1, 0), bad), [{}, {}])
        with pytest.raises(UserError, match="query 0"):
            store.search(vectors(bad), 1)
    with pytest.raises(UserError, match="holds vectors 2 wide; these are 3"):
        store.add(["west"], vectors((1, 0, 0)), [{}])
    with pytest.raises(UserError, match="holds vectors 2 wide; the query is 3"):
        store.search(vectors((1, 0, 0)), 1)
    assert store.count() == 3


def test_it_remembers_whose_vectors_it_holds(tmp_path: Path):
    store = FlatStore(tmp_path / "store")
    store.claim("a" * 64, "first")
    assert not (tmp_path / "store").exists()
    store.claim("b" * 64, "second")  # nothing is kept yet
    store.add(["x"], vectors((1, 0)), [{}])
    store.close()
    store = FlatStore(tmp_path / "store")
    assert store.model == "b" * 64
    store.claim("b" * 64, "second")
    with pytest.raises(
        UserError, match=r"made with the model second \(b{12}\), not first \(a{12}\).*clasp index RUN FOLDER"
    ):
        store.claim("a" * 64, "first")
    store.clear()
    store.claim("a" * 64, "first")
    store.add(["x"], vectors((1, 0)), [{}])
    assert FlatStore(tmp_path / "store").model == "a" * 64


def test_a_claim_outlives_a_look_at_what_others_wrote(tmp_path: Path):
    early = FlatStore(tmp_path / "store")
    early.claim("a", "first")
    late = FlatStore(tmp_path / "store")
    late.claim("b", "second")
    late.add(["x"], vectors((1, 0)), [{}])
    late.close()
    with pytest.raises(UserError, match="made with the model second"):
        early.add(["y"], vectors((1, 0)), [{}])
