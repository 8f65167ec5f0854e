"""Every engine of a store: the same answers as an obvious search, and nothing acknowledged lost or stored twice."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clasp.search import edge_store
from clasp.search.edge_store import EdgeStore
from clasp.search.engine import UpdatableStore
from clasp.search.flat_store import FlatStore
from clasp.search.metadata_filter import FILTER_OPERATORS, MetadataFilters, parse_filter
from clasp.search.payload import compile_filters, encode_payload
from clasp.search.qdrant_store import QdrantStore
from clasp.types import Hit, UserError
from toystores import NEEDED, engine_parameters

Opener = Callable[[Path], UpdatableStore]
every_engine = pytest.mark.parametrize("open_store", engine_parameters())


def rows(*values: tuple[float, ...]) -> np.ndarray:
    return np.array(values, np.float32)


def few(store: UpdatableStore) -> UpdatableStore:
    """East, north, and north-east; the last is not of unit length."""
    store.add(["east", "north", "both"], rows((1, 0), (0, 1), (2, 2)), [{"n": 1}, {"n": 2}, {"n": 3}])
    return store


def found(store: UpdatableStore, *query: float, k: int = 10) -> list[tuple[str, float]]:
    return [(hit.id, round(hit.score, 4)) for hit in store.search(rows(query), k)[0]]


def entry(number: int, chance: np.random.Generator) -> dict[str, Any]:
    """Metadata of an image, with fields of every kind that a filter has to tell apart."""
    own: dict[str, Any] = {"year": 2000 + number % 30, "mixed": [number % 3, str(number % 3), "x", True][number % 4]}
    if number % 2:
        own["date"] = f"20{number % 30:02}-{number % 12 + 1:02}-05"
    if number % 5 == 0:
        own["tags"] = [f"T{number % 7}", "ALL"]
    if number % 9 == 0:
        own["huge"] = 10**400 + number % 2
    folder = ["/photos/Holidays/sea", "/photos/holidays", "/work", "set.tar::holidays"][number % 4]
    languages = ["de"] if number % 3 else []
    return {
        "name": f"{folder}/\udcff{number}.jpg",
        "group": f"g{number % 11}",
        "captions": [{"text": f"a caption {number % 6}", "language": "de"}],
        "languages": languages,
        "meta": own,
        "file": {"date": "2013-04-01", "width": 100 + number % 9, "bytes": 1000 * number},
    }


CONDITIONS = [
    *("folder=holidays", "folder=photos/holidays", "folder!=holidays", "folder~photos", "folder=/", "language=DE"),
    *("group=G3", "group!=g3", "caption=a caption 2", "caption~caption 3", "name~7.jpg"),
    *("tags=t3", "tags=all", "tags!=T3", "year=2003", "year=2003.0", "year=2e3", "year!=2003", "year=nan"),
    *("mixed=1", "mixed=true", "mixed=x", "mixed>0", "mixed>=a", "mixed<a", "mixed!=1", "year>inf", "year<inf"),
    *("date=2013-02-05", "date>=2013", "date<2013-06", "date>2013-06-04", "date<=2013-02-05", "date~-05"),
    *("width=103", "width>104", "bytes=3000", "bytes!=3000", "bytes>=250000", "bytes>a", "bytes<a", "date=2013-04-01"),
    *("year>2025", "year>=2025", "year<2003", "year<=2003", "year>a", "none=1", "none!=1", "none>1"),
    *(f"huge={10**400}", f"huge!={10**400}"),
]


@every_engine
def test_as_the_obvious_search_with_every_filter(tmp_path: Path, open_store: Opener):
    chance = np.random.default_rng(0)
    vectors = chance.standard_normal((300, 8), np.float32)
    vectors[250:] = vectors[:50]  # ties
    ids = [f"{number:x}" for number in chance.permutation(300)]
    meta = [entry(number, chance) for number in range(300)]
    store = open_store(tmp_path / "store")
    for start in range(0, 300, 100):
        store.add(ids[start : start + 100], vectors[start : start + 100], meta[start : start + 100])
    gone = ids[::7]
    assert store.delete([*gone, "never stored"]) == len(gone)
    left = [number for number in range(300) if ids[number] not in gone]
    query = chance.standard_normal(8)
    cosines = vectors.astype(np.float64) @ query / np.linalg.norm(vectors.astype(np.float64), axis=1)
    cosines /= np.linalg.norm(query)
    for condition in (None, *CONDITIONS):
        where = None if condition is None else MetadataFilters((parse_filter(condition),))
        passing = [number for number in left if where is None or where(meta[number])]
        expected = sorted(passing, key=lambda number: (-round(cosines[number], 9), ids[number]))
        for k in (1, 10, 400):
            hits = store.search(query[None], k, where)[0]
            assert [hit.id for hit in hits] == [ids[number] for number in expected[:k]], condition
            assert [hit.score for hit in hits] == pytest.approx([cosines[n] for n in expected[:k]], abs=1e-6)
    odd = store.search(query[None], 5, lambda about: about["meta"]["year"] % 2 == 1)[0]
    assert len(odd) == 5 and all(hit.meta["meta"]["year"] % 2 for hit in odd)
    store.close()


def test_most_filters_become_conditions():
    chance = np.random.default_rng(0)
    for condition in CONDITIONS:
        narrowed = compile_filters(MetadataFilters((parse_filter(condition),)))
        compared = any(operator in condition for operator in ("!=", "~")) or condition.startswith(
            ("caption", "none", "bytes=")
        )
        assert bool(narrowed) or compared or condition == "folder=/", condition
    assert compile_filters(lambda about: True) == [] and compile_filters(None) == []
    assert set(FILTER_OPERATORS) == {"!=", ">=", "<=", "=", "~", ">", "<"}  # a new one has to be compiled, or checked
    payload = encode_payload("a", entry(5, chance), 1)
    assert all(isinstance(value, str | int | list) for value in payload.values()) and str(payload).isascii()


@pytest.mark.parametrize("open_store", engine_parameters("edge"))
def test_the_index_finds_what_a_scan_finds(tmp_path: Path, open_store: Opener, monkeypatch: pytest.MonkeyPatch):
    """Recall of the graph over vectors without clusters, where all, most, half or few entries pass a filter."""
    monkeypatch.setattr("clasp.search.edge_store._INDEX_KILOBYTES", 100)
    monkeypatch.setattr("clasp.search.edge_store._SCAN_KILOBYTES", 1)
    chance = np.random.default_rng(0)
    vectors, queries = chance.standard_normal((2000, 16), np.float32), chance.standard_normal((20, 16), np.float32)
    plain = {"captions": [], "languages": []}
    meta = [{"name": f"{n}", "group": f"{n}", "meta": {"year": 2000 + n % 30}, **plain} for n in range(2000)]
    store = open_store(tmp_path / "store")
    store.add([*map(str, range(2000))], vectors, meta)
    store.close()  # builds it
    indexed = store._collection._open_shard.info().indexed_vectors_count  # pyright: ignore[reportAttributeAccessIssue]
    assert indexed == 2000, "else a scan is compared with a scan"
    cosines = queries @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    for condition in (None, "year>=2001", "year>=2015", "year=2003"):
        where = None if condition is None else MetadataFilters((parse_filter(condition),))
        allowed = np.array([where is None or where(about) for about in meta])
        assert allowed.sum() * vectors[0].nbytes > 1024 * edge_store._SCAN_KILOBYTES, "else they are scanned"
        nearest = np.argsort(-np.where(allowed, cosines, -np.inf), axis=1)[:, :10]
        hits = store.search(queries, 10, where)
        kept = [len({hit.id for hit in some} & {*map(str, best)}) for some, best in zip(hits, nearest, strict=True)]
        assert np.mean(kept) >= 9, condition
    store.close()


@pytest.mark.parametrize("open_store", engine_parameters("edge"))
def test_an_index_records_how_many_candidates_it_needs(
    tmp_path: Path, open_store: Opener, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"_INDEX_KILOBYTES": 100, "_SCAN_KILOBYTES": 1, "_EF": (1, 2, 500)}.items():
        monkeypatch.setattr(edge_store, name, value)
    chance = np.random.default_rng(0)

    def add(store: UpdatableStore, start: int, count: int) -> dict[str, Any]:
        vectors = chance.standard_normal((count, 256), np.float32)
        store.add([str(n) for n in range(start, start + count)], vectors, [{}] * count)
        store.close()
        return json.loads((tmp_path / "store" / "manifest.json").read_text())

    store = open_store(tmp_path / "store")
    assert (first := add(store, 0, 1500))["candidates"] == 500 and first["measured"] == 1500
    assert add(store, 1500, 50)["measured"] == 1500, "few more entries need as many"
    assert add(store, 1550, 500)["measured"] == 2050
    asked: list[int] = []
    walk = edge_store._walk
    monkeypatch.setattr(edge_store, "_walk", lambda candidates: asked.append(candidates) or walk(candidates))
    query = chance.standard_normal((1, 256))
    store.search(query, 10)
    store.search(query, 10, MetadataFilters((parse_filter("year>2000"),)))
    assert asked == [500, 1000], "a walk with a filter misses more"
    store.clear()
    assert add(store, 0, 20)["measured"] == 0, "few entries are scored one by one"


@pytest.mark.parametrize("open_store", engine_parameters("edge"))
def test_terms_are_hashes_and_in_an_earlier_index_text(
    tmp_path: Path, open_store: Opener, monkeypatch: pytest.MonkeyPatch
):
    import qdrant_edge

    chance = np.random.default_rng(3)
    vectors = chance.standard_normal((40, 8)).astype(np.float32)
    where = MetadataFilters((parse_filter("tags=all"), parse_filter("language=de")))
    answers = []
    for name in ("now", "earlier"):
        if name == "earlier":
            monkeypatch.setattr(qdrant_edge, "IntegerIndexParams", lambda **given: qdrant_edge.KeywordIndexParams())
            monkeypatch.setattr(edge_store._EdgeCollection, "_term", lambda collection, term: term)
            monkeypatch.setattr(edge_store, "EdgeManifest", functools.partial(edge_store.EdgeManifest, format=1))
        store = open_store(tmp_path / name)
        store.add([str(n) for n in range(20)], vectors[:20], [entry(n, chance) for n in range(20)])
        store.close()
        monkeypatch.undo()
        again = open_store(tmp_path / name)
        assert json.loads((tmp_path / name / "manifest.json").read_text())["format"] == (2 if name == "now" else 1)
        again.add([str(n) for n in range(20, 40)], vectors[20:], [entry(n, chance) for n in range(20, 40)])
        answers.append([hit.id for hit in again.search(vectors[:1], 40, where)[0]])
        again.close()
    passing = [str(n) for n in range(40) if where(entry(n, chance))]
    assert sorted(answers[0]) == sorted(passing) and answers[1] == answers[0] and len(passing) > 1
    assert {int(name) < 20 for name in passing} == {True, False}, "in what was added before and after"


@pytest.mark.parametrize("open_store", engine_parameters("edge"))
def test_terms_of_one_hash_are_told_apart(tmp_path: Path, open_store: Opener, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(edge_store._EdgeCollection, "_term", lambda collection, term: 1)
    chance = np.random.default_rng(4)
    store, entries = open_store(tmp_path / "store"), [entry(n, chance) for n in range(40)]
    store.add([*map(str, range(40))], chance.standard_normal((40, 8)).astype(np.float32), entries)
    for condition in ("language=de", "language!=de", "tags=all"):
        where = MetadataFilters((parse_filter(condition),))
        passing = {str(n) for n, about in enumerate(entries) if where(about)}
        assert {hit.id for hit in store.search(rows((1,) * 8), 40, where)[0]} == passing and 0 < len(passing) < 40
    store.close()


@every_engine
def test_many_queries_equal_vectors_and_replacement(tmp_path: Path, open_store: Opener):
    store = open_store(tmp_path / "store")
    assert store.count() == 0 and list(store.scan()) == [] and store.model == ""
    assert store.search(rows((1, 0)), 3) == [[]] and store.delete(["x"]) == 0
    assert isinstance(store, UpdatableStore)
    few(store)
    assert store.search(rows((3, 0)), 1) == [[Hit("east", 1.0, {"n": 1})]]
    both = store.search(rows((1, 0), (0, 1)), 1)
    assert [[hit.id for hit in hits] for hits in both] == [["east"], ["north"]]
    store.add(["north", "west", "west"], rows((0, 2), (0, 1), (-1, 0)), [{"n": 4}, {"n": 5}, {"n": 6}])
    assert found(store, 0, 1) == [("north", 1.0), ("both", 0.7071), ("east", 0.0), ("west", 0.0)]
    assert store.count() == 4
    assert store.metadata(["west", "north"]) == [{"n": 6}, {"n": 4}]
    assert store.vectors(["both", "both"]).tolist() == pytest.approx(np.full((2, 2), 0.5**0.5))
    assert [name for name, _ in store.scan()] == ["east", "both", "north", "west"]
    for read in (store.vectors, store.metadata):
        with pytest.raises(KeyError, match="nowhere"):
            read(["east", "nowhere"])
    equal = [f"{number:03}" for number in np.random.default_rng(1).permutation(300)]
    store.add(equal, rows((-1, -1)).repeat(300, axis=0), [{}] * 300)
    assert [name for name, _ in found(store, -1, -1, k=20)] == [f"{number:03}" for number in range(20)]
    store.close()


@pytest.mark.parametrize("open_store", engine_parameters("edge"))
def test_what_was_read_is_not_asked_for_again(tmp_path: Path, open_store: Opener, monkeypatch: pytest.MonkeyPatch):
    store, asked = open_store(tmp_path / "store"), list[str]()
    store.add([str(number) for number in range(300)], rows((1, 1)).repeat(300, axis=0), [{}] * 300)
    points = edge_store._EdgeCollection.points

    def record(collection: Any, ids: Sequence[str]) -> Any:
        assert ids, "a request for nothing"
        asked.extend(ids)
        return points(collection, ids)

    monkeypatch.setattr(edge_store._EdgeCollection, "points", record)
    assert len(found(store, 1, 1, k=20)) == 20  # more are fetched, since all are tied
    assert len(asked) == len(set(asked)) == 300
    store.close()


@every_engine
def test_everything_is_there_after_reopening(tmp_path: Path, open_store: Opener):
    store = open_store(tmp_path / "store")
    store.claim("a" * 64, "first")
    few(store)
    store.delete(["north"])
    store.add(["caf\udcff"], rows((-1, 0)), [{"name": "\udcff", "n": None, "list": [1, {"a": 2.5}]}])
    store.close()
    store = open_store(tmp_path / "store")
    assert found(store, 1, 0) == [("east", 1.0), ("both", 0.7071), ("caf\udcff", -1.0)]
    assert store.metadata(["caf\udcff"]) == [{"name": "\udcff", "n": None, "list": [1, {"a": 2.5}]}]
    assert store.model == "a" * 64 and store.count() == 3
    store.close()


@every_engine
def test_the_model_is_recorded_and_another_refused(tmp_path: Path, open_store: Opener):
    store = open_store(tmp_path / "store")
    store.claim("a" * 64, "first")
    store.claim("b" * 64, "second")  # nothing is stored yet
    few(store)
    store.close()
    store = open_store(tmp_path / "store")
    assert store.model == "b" * 64
    store.claim("b" * 64, "second")
    with pytest.raises(UserError, match=r"made with the model second \(b{12}\), not first \(a{12}\)"):
        store.claim("a" * 64, "first")
    store.clear()
    assert store.count() == 0 and store.model == "" and list(store.scan()) == []
    store.claim("a" * 64, "first")
    store.add(["wide"], rows((1, 0, 0)), [{}])  # an empty store takes any width
    store.close()
    store = open_store(tmp_path / "store")
    assert (store.model, store.count()) == ("a" * 64, 1)
    store.close()


@every_engine
def test_what_is_refused(tmp_path: Path, open_store: Opener):
    store = few(open_store(tmp_path / "store"))
    for bad in ((0.0, 0.0), (float("nan"), 1.0), (float("inf"), 1.0)):
        with pytest.raises(UserError, match="'west' is zero or not finite"):
            store.add(["good", "west"], rows((1, 0), bad), [{}, {}])
        with pytest.raises(UserError, match="query 0"):
            store.search(rows(bad), 1)
    with pytest.raises(UserError, match="holds vectors 2 wide; these are 3"):
        store.add(["west"], rows((1, 0, 0)), [{}])
    with pytest.raises(UserError, match="holds vectors 2 wide; the query is 3"):
        store.search(rows((1, 0, 0)), 1)
    assert store.count() == 3
    store.close()


WRITER = """
import sys, warnings
from importlib.util import find_spec
from pathlib import Path
import numpy as np
warnings.simplefilter("ignore")
from toystores import ENGINES
store = ENGINES[sys.argv[1]](Path(sys.argv[2]))
for number in range(100_000):
    store.add([f"{number}-{n}" for n in range(20)], np.ones((20, 16), np.float32), [{"number": number}] * 20)
    print("+", number, flush=True)
    store.delete([f"{number}-{n}" for n in range(10)])
    print("-", number, flush=True)
"""


@every_engine
def test_a_kill_loses_nothing_acknowledged(tmp_path: Path, open_store: Opener, request: pytest.FixtureRequest):
    engine = request.node.callspec.id
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = [sys.executable, "-c", WRITER, engine, str(tmp_path / "store")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ | paths) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(12)]
        child.kill()
        lines += [line for line in child.stdout if line.endswith("\n")]
    acknowledged = [line.split() for line in lines]
    added = {int(number) for sign, number in acknowledged if sign == "+"}
    deleted = {int(number) for sign, number in acknowledged if sign == "-"}
    store = open_store(tmp_path / "store")
    ids = [name for name, _ in store.scan()]
    assert len(ids) == len(set(ids)) == store.count()
    assert len(added) >= 6
    for number in added:
        assert set(range(10, 20)) <= {n for n in range(20) if f"{number}-{n}" in ids}
    assert not [f"{number}-{n}" for number in deleted for n in range(10) if f"{number}-{n}" in ids]
    store.add(["more"], np.ones((1, 16), np.float32), [{}])  # and it can be gone on with
    store.close()


@pytest.mark.parametrize("open_store", engine_parameters("edge"))
def test_one_process_opens_an_embedded_index(tmp_path: Path, open_store: Opener):
    first = few(open_store(tmp_path / "store"))
    with pytest.raises(UserError, match=r"store is open elsewhere, and one process at a time .*end that command"):
        open_store(tmp_path / "store")
    first.close()
    second = open_store(tmp_path / "store")
    with pytest.raises(UserError, match="is open elsewhere"):
        first.search(rows((1, 0)), 1)
    second.close()
    assert found(first, 1, 0, k=1) == [("east", 1.0)]  # a store that was closed opens again
    first.close()


@pytest.mark.parametrize("open_store", engine_parameters("edge"))
def test_a_damaged_or_foreign_folder_is_refused(tmp_path: Path, open_store: Opener):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"photos is not a store: it has no manifest\.json, but cat\.jpg"):
        open_store(tmp_path / "photos")
    with pytest.raises(UserError, match="is a file"):
        open_store(tmp_path / "photos" / "cat.jpg")
    flat = few(FlatStore(tmp_path / "flat"))
    flat.close()
    with pytest.raises(UserError, match=r"manifest\.json is damaged or of another engine"):
        open_store(tmp_path / "flat")
    few(open_store(tmp_path / "edge")).close()
    (shard,) = (tmp_path / "edge").glob("shard-*")
    (shard / "edge_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot open it") as caught:
        open_store(tmp_path / "edge")
    assert "\n" not in str(caught.value) and "clasp index RUN FOLDER" in str(caught.value)
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="shard-1 is missing"):
        open_store(tmp_path / "edge")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clasp.search.edge_store.find_spec", lambda name: None)
    monkeypatch.setattr("clasp.search.qdrant_store.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs qdrant_edge; type: pip install 'clasp-vl\[edge\]'"):
        EdgeStore(tmp_path / "store")
    with pytest.raises(UserError, match=r"needs qdrant_client, urllib3; type: pip install 'clasp-vl\[qdrant\]'"):
        QdrantStore.at("http://127.0.0.1:6333/photos")
    for bad in ("http://127.0.0.1:6333", "ftp://host/photos", "http:///photos", "http://host/a/b"):
        with pytest.raises(UserError, match="given as http://HOST:6333/COLLECTION"):
            QdrantStore.at(bad)


@pytest.mark.skipif(not all(map(find_spec, NEEDED["qdrant"])), reason="the extra [qdrant] is not installed")
def test_a_server_that_does_not_answer_is_named():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/photos: cannot open it") as caught:
        QdrantStore.at("http://127.0.0.1:9/photos")
    assert "\n" not in str(caught.value)
