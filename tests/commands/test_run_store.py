"""Which store holds the index of a run: chosen, recorded, found again by every verb, and moved to another engine."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from clasp.commands.run_store import index_version, recorded_store, writable_store
from clasp.commands.search import index_images, search_images
from clasp.commands.serve import ChangingRunIndex, RunIndex
from clasp.commands.store_copy import copy_index
from clasp.config.build import load
from clasp.search.edge_store import EdgeStore
from clasp.search.flat_store import FlatStore
from clasp.search.store_copy import copy_entries
from clasp.search.store_registry import FLAT_ENTRIES, open_store, suggest_store
from clasp.serve.warm_server import ServerRecord, write_record
from clasp.types import UserError
from toydata import toys, write_folder, write_images
from toyruns import recipe, run, save_towers
from toysearch import model
from toystores import engine_parameters

pytestmark = pytest.mark.parametrize("edge", engine_parameters("edge"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    pairs = write_folder(toys(24), folder / "pairs")
    run(recipe(save_towers(folder), pairs, "train.epochs=1"), folder / "run")
    write_images(toys(20), folder / "pictures")
    return folder


def test_from_flat_to_edge_and_back(trained: Path, edge: object):
    folder, pictures = trained / "run", str(trained / "pictures")
    assert recorded_store(folder) is None
    with pytest.raises(UserError, match="has no index yet"):
        copy_index(folder, "edge")
    empty = ChangingRunIndex(folder, load(folder)).open()
    assert empty.engine.store.count() == 0 and recorded_store(folder) is None
    assert index_images(folder, pictures).added == 20
    assert recorded_store(folder) == "flat" and not (folder / "store.json").exists()
    before = search_images(folder, "a red ring", [], 5, ["folder=pictures"])
    with pytest.raises(UserError, match=r"has 20 images in the store flat, not edge; .*clasp store copy"):
        index_images(folder, pictures, store="edge")
    with pytest.raises(UserError, match="in the store flat already"):
        copy_index(folder, "flat")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = ServerRecord(f"http://127.0.0.1:{listening.getsockname()[1]}", os.getpid(), "key")
        write_record(folder, server)
        with pytest.raises(UserError, match=f"is served at {server.address}, .*; stop that server .*, copy, and start"):
            copy_index(folder, "edge")
    moved = copy_index(folder, "edge")  # the server has ended, and left its record
    assert (moved.entries, moved.source, moved.target) == (20, "flat", "edge")
    assert json.loads((folder / "store.json").read_text()) == {"store": "edge"} and not (folder / "index").exists()
    after = search_images(folder, "a red ring", [], 5, ["folder=pictures"])
    assert [hit.id for hit in after.hits] == [hit.id for hit in before.hits]
    assert [hit.score for hit in after.hits] == pytest.approx([hit.score for hit in before.hits], abs=1e-6)
    assert search_images(folder, "a red ring", [], 5, ["folder!=pictures"]).hits == []

    (trained / "pictures").rename(trained / "moved")
    (trained / "moved").rename(trained / "pictures")
    again = index_images(folder, pictures)  # the store is found, nothing is encoded
    assert (again.added, again.unchanged) == (0, 20)
    source = RunIndex(folder, load(folder))
    opened = source.open()
    assert opened.engine.store.count() == 20
    with pytest.raises(UserError, match="open elsewhere"):  # one process a folder: a running server has it
        index_images(folder, pictures)
    store = opened.engine.store
    with source.writer(store) as same:  # what changes by HTTP goes through the store that is open
        assert same is store
        name, meta = next(iter(store.scan()))
        same.add(["copy"], store.vectors([name]), [meta])
    assert store.count() == 21 and store.delete(["copy"]) == 1
    store.close()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        write_record(folder, ServerRecord(f"http://127.0.0.1:{listening.getsockname()[1]}", os.getpid(), "key"))
        with pytest.raises(UserError, match=r"is served at .*; stop that server"):  # of the source too
            copy_index(folder, "flat")

    assert copy_index(folder, "flat").source == "edge"
    assert recorded_store(folder) == "flat" and not (folder / "index-edge").exists()
    assert [hit.id for hit in search_images(folder, "a red ring", [], 5).hits] == [hit.id for hit in before.hits]


def test_a_new_index_in_the_store_that_was_asked_for(tmp_path: Path, edge: object):
    version = index_version(tmp_path)
    with writable_store(tmp_path, "edge", 3, print) as store:
        assert isinstance(store, EdgeStore)
    assert recorded_store(tmp_path) == "edge" and index_version(tmp_path) != version
    with writable_store(tmp_path, "flat", 3, print) as store:  # the other is empty
        assert isinstance(store, FlatStore)
    for wrong in ("lancedb", "ftp://host/photos", "http://host", "a/b:c"):
        named = rf"^'{wrong}' is not an engine of a store; there are flat|^{wrong}: a Qdrant collection is given as"
        with pytest.raises(UserError, match=named), writable_store(tmp_path, wrong, 3, print):
            pass
        with pytest.raises(UserError, match=named):
            copy_index(tmp_path, wrong)
    with writable_store(tmp_path, "toystores:OutsideStore", 3, print) as store:
        assert type(store).__name__ == "OutsideStore"
    with writable_store(tmp_path, "toystores:OutsideStore", 3, print):
        pass  # it was asked for again
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(UserError, match=r"store\.json is damaged"):
        recorded_store(tmp_path)


def test_the_size_decides_and_the_reason_is_told(tmp_path: Path, edge: object):
    assert suggest_store(FLAT_ENTRIES)[0] == "flat"
    said: list[str] = []
    with writable_store(tmp_path, None, FLAT_ENTRIES + 1, said.append) as store:
        assert isinstance(store, EdgeStore)
    assert said == ["store edge: 300,001 images are more than 300,000, where an HNSW index is faster"]


def test_an_interrupted_copy_is_repeated_and_strange_entries_are_refused(tmp_path: Path, edge: object):
    names = [f"{number}.png" for number in range(1200)]
    source = FlatStore(tmp_path / "index")
    source.claim(model().fingerprint, "colours")
    vectors = model().encode_text(["a red", "a blue"]).numpy().repeat(600, axis=0)
    source.add(names, vectors, [{"number": number} for number in range(1200)])
    target = open_store(tmp_path, "edge")

    def interrupt(done: int, total: int) -> None:
        if done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_entries(source, target, interrupt)
    assert target.count() == 1000
    assert copy_entries(source, target, lambda done, total: None) == 1200
    assert list(target.scan())[:3] == list(source.scan())[:3]
    source.delete(names[:5])
    with pytest.raises(UserError, match=r"entries that are not of this run, such as \['0\.png'\]"):
        copy_entries(source, target, lambda done, total: None)
    target.close()
    source.close()
