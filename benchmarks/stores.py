"""Search in the stores: p50, p95 and recall@10 of flat and edge, with and without filters, beside FAISS if installed.

By hand: ``python -m benchmarks.stores --entries 200000 --width 256``; not a part of ``make bench``. Printed as JSON,
with the machine. The vectors are synthetic: 2,000 clusters in a subspace of 48 dimensions, with noise in all, since
uniformly random vectors have no near neighbours; queries are of the same distribution and not stored. ``--hard``: 300
clusters of very unequal size with noise in all dimensions, queries that lie apart from all entries, as words do from
images, and cameras that go with the clusters, so that half of the queries are about a cluster that a filter admits one
in a hundred of. Recall is counted against the exact search. FAISS (``faiss-cpu``: HNSW, M = 32, ef = 128, and the exact
index) has no payload and no filter. Each engine is filled in a process of its own and searched in another: ``open_s``
is opening and the first answer, ``peak_mb`` the most resident memory of the second, mapped files included,
``anonymous_mb`` what it holds after the searches without these. 2,000,000 entries need about 14 GB of disk, and 3 GB of
memory for FAISS. With ``--folder`` vectors and filled engines stay there, and the next call only fills what is missing,
and searches: ``--fill-only`` beforehand separates the hours of filling from what is measured; killed, it goes on where
it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from clasp.search.edge_store import EdgeStore, has_edge_extra
from clasp.search.engine import UpdatableStore
from clasp.search.flat_store import FlatStore
from clasp.search.metadata_filter import MetadataFilters, parse_filter

CLUSTERS, DIMENSIONS, NOISE, K, CHUNK = 2_000, 48, 0.15, 10, 2_000
HARD_CLUSTERS = 300
FILTERS = ("year>=2018", "year>=2013", "camera=Nikon", "camera=Leica")  # shares of 20, 70, 33 and 67 %
STORES: dict[str, Callable[[Path], UpdatableStore]] = {"flat": FlatStore, "edge": EdgeStore}
VECTORS, QUERIES, CAMERAS, TRUTHS = "vectors.npy", "queries.npy", "cameras.npy", "truths.npy"
MADE = "made.json"
Search = Callable[[np.ndarray], list[str]]


def synthetic(count: int, width: int, seed: int) -> np.ndarray:
    """Unit vectors ``[count width]``; the clusters are the same for every seed."""
    fixed, chance = np.random.default_rng(0), np.random.default_rng(seed)
    basis = fixed.standard_normal((DIMENSIONS, width)).astype(np.float32)
    centres = fixed.standard_normal((CLUSTERS, DIMENSIONS)).astype(np.float32)
    points = centres[chance.integers(0, CLUSTERS, count)] + 0.6 * chance.standard_normal((count, DIMENSIONS))
    values = (points.astype(np.float32) @ basis) / DIMENSIONS**0.5
    values += NOISE * chance.standard_normal((count, width), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def hard(count: int, width: int, seed: int, queries: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors ``[count width]``, and whether the camera of each is the one that a third of the entries has."""
    fixed, chance = np.random.default_rng(0), np.random.default_rng(seed)
    centres = fixed.standard_normal((HARD_CLUSTERS, width), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    apart = fixed.standard_normal(width, dtype=np.float32)
    sizes = fixed.pareto(1.2, HARD_CLUSTERS) + 0.2
    with_camera = np.cumsum(sizes) <= sizes.sum() / 3  # so many clusters, and one in a hundred of the other entries
    drawn = chance.choice(HARD_CLUSTERS, count, p=None if queries else sizes / sizes.sum())
    values = centres[drawn] + 0.9 / width**0.5 * chance.standard_normal((count, width), dtype=np.float32)
    values += (-0.8 if queries else 0.8) * apart / np.linalg.norm(apart)
    cameras = with_camera[drawn] ^ (chance.random(count) < 0.01)
    return values / np.linalg.norm(values, axis=1, keepdims=True), cameras


def write_vectors(folder: Path, entries: int, width: int, queries: int, is_hard: bool) -> None:
    """The vectors, the queries, and the rows of the ``K`` nearest to each, without and with each filter."""
    made = np.lib.format.open_memmap(folder / VECTORS, "w+", np.float32, (entries, width))
    asked = hard(queries, width, 2, queries=True)[0] if is_hard else synthetic(queries, width, 2)
    best = np.full((1 + len(FILTERS), queries, K), -np.inf, np.float32)
    rows = np.zeros((1 + len(FILTERS), queries, K), np.int64)
    nikon = np.arange(entries) % 3 == 0
    for start in range(0, entries, 50_000):
        numbers = np.arange(start, min(start + 50_000, entries))
        if is_hard:
            part, nikon[numbers] = hard(len(numbers), width, 1000 + start)
        else:
            part = synthetic(len(numbers), width, 1000 + start)
        made[start : start + len(part)] = part
        years, camera = numbers % 10, nikon[numbers]
        for kind, allowed in enumerate((numbers >= 0, years >= 8, years >= 3, camera, ~camera)):
            scores = np.concatenate([best[kind], asked @ part[allowed].T], axis=1)
            known = np.concatenate([rows[kind], np.broadcast_to(numbers[allowed], (queries, allowed.sum()))], axis=1)
            nearest = np.argpartition(-scores, K, axis=1)[:, :K]
            best[kind], rows[kind] = (np.take_along_axis(each, nearest, axis=1) for each in (scores, known))
    made.flush()
    np.save(folder / QUERIES, asked)
    np.save(folder / CAMERAS, nikon)
    np.save(folder / TRUTHS, rows)


def metadata(number: int, nikon: bool) -> dict[str, Any]:
    """The metadata of an image, as ``clasp index`` writes it."""
    return {
        "name": f"/photos/{number % 40}/{number}.jpg",
        "source": {"kind": "file", "path": f"/photos/{number % 40}/{number}.jpg"},
        "version": f"{number}",
        "sha256": f"{number:064x}",
        "origins": ["/photos"],
        "captions": [],
        "languages": [],
        "group": f"{number}",
        "meta": {"year": 2010 + number % 10, "camera": "Nikon" if nikon else "Leica"},
    }


def fill(name: str, folder: Path) -> dict[str, Any]:
    """Add all vectors to an engine, close it, and record the seconds in ``NAME.json``, which marks it as whole.

    A fill that went on after it was interrupted has no seconds, but where it went on.
    """
    values = np.load(folder / VECTORS, mmap_mode="r")
    began = time.perf_counter()
    done = (fill_store if name in STORES else fill_faiss)(name, folder / name, values)
    filled = {"resumed_at": done} if done else {"fill_s": round(time.perf_counter() - began, 1)}
    (folder / f"{name}.json").write_text(json.dumps(filled))
    return filled


def fill_store(name: str, target: Path, values: np.ndarray) -> int:
    """Returns the entries that were there."""
    store, nikon = STORES[name](target), np.load(target.parent / CAMERAS).tolist()
    done = max(0, store.count() - CHUNK) // CHUNK * CHUNK  # before it was interrupted; ids are added in order
    for start in range(done, len(values), CHUNK):
        part = range(start, min(start + CHUNK, len(values)))
        store.add([str(n) for n in part], values[part.start : part.stop], [metadata(n, nikon[n]) for n in part])
    store.close()
    return done


def fill_faiss(name: str, target: Path, values: np.ndarray) -> int:
    import faiss  # type: ignore[import-not-found]

    if name == "faiss-flat":
        index = faiss.IndexFlatIP(values.shape[1])
    else:
        index = faiss.IndexHNSWFlat(values.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    for start in range(0, len(values), CHUNK):
        index.add(np.ascontiguousarray(values[start : start + CHUNK]))
    faiss.write_index(index, str(target))
    return 0


def measure(search: Search, queries: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """One query at a time, after ten to warm up."""
    for query in queries[:10]:
        search(query)
    seconds, recall = [], []
    for query, expected in zip(queries, truth.tolist(), strict=True):
        began = time.perf_counter()
        found = search(query)
        seconds.append(time.perf_counter() - began)
        recall.append(len(set(found) & set(map(str, expected))) / len(expected))
    p50, p95 = np.quantile(seconds, (0.5, 0.95)) * 1e3
    return {"p50_ms": round(float(p50), 3), "p95_ms": round(float(p95), 3), "recall": round(float(np.mean(recall)), 4)}


def measure_store(name: str, folder: Path, queries: np.ndarray, truths: np.ndarray) -> dict[str, Any]:
    """Open a filled store and search it without and with each filter."""
    began = time.perf_counter()
    store = STORES[name](folder / name)

    def ask(query: np.ndarray, where: MetadataFilters | None = None) -> list[str]:
        return [hit.id for hit in store.search(query[None], K, where)[0]]

    ask(queries[0])
    opened = time.perf_counter() - began
    plain = measure(ask, queries, truths[0])
    filtered = {}
    for condition, truth in zip(FILTERS, truths[1:], strict=True):
        ask_with = partial(ask, where=MetadataFilters((parse_filter(condition),)))
        filtered[f"with {condition}"] = measure(ask_with, queries, truth)
    store.close()
    size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
    return {**plain, **filtered, "open_s": round(opened, 2), "disk_mb": size // 2**20}


def measure_faiss(name: str, folder: Path, queries: np.ndarray, truths: np.ndarray) -> dict[str, Any]:
    """Read an index of FAISS into memory, and search it."""
    import faiss  # type: ignore[import-not-found]

    began = time.perf_counter()
    index = faiss.read_index(str(folder / name))
    if name == "faiss-hnsw":
        index.hnsw.efSearch = 128

    def ask(query: np.ndarray) -> list[str]:
        return [str(n) for n in index.search(query[None], K)[1][0]]

    ask(queries[0])
    opened = time.perf_counter() - began
    size = (folder / name).stat().st_size
    return {**measure(ask, queries, truths[0]), "open_s": round(opened, 2), "disk_mb": size // 2**20}


def measure_here(name: str, folder: Path) -> dict[str, Any]:
    """The row of one filled engine, with the memory of this process."""
    queries, truths = np.load(folder / QUERIES), np.load(folder / TRUTHS)
    row = (measure_store if name in STORES else measure_faiss)(name, folder, queries, truths)
    return {**row, **memory()}


def memory() -> dict[str, int]:
    """Megabytes of this process. Not of ``getrusage``, whose peak is also that of the process it was started by."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        key: round(int(status[name].split()[0]) / 1024)
        for key, name in (("peak_mb", "VmHWM"), ("anonymous_mb", "RssAnon"))
    }


def in_a_process(step: str, name: str, folder: Path) -> dict[str, Any]:
    """``fill`` or ``measure_here`` in a new process."""
    command = [sys.executable, "-m", "benchmarks.stores", f"--{step}", name, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def engine_row(name: str, folder: Path, fill_only: bool) -> dict[str, Any]:
    """Fill the engine unless it is, then measure it."""
    missing = {"edge": not has_edge_extra(), "faiss-flat": find_spec("faiss") is None}
    missing["faiss-hnsw"] = missing["faiss-flat"]
    if missing.get(name):
        return {"missing": "not installed"}
    marker = folder / f"{name}.json"
    filled = json.loads(marker.read_text()) if marker.exists() else in_a_process("fill", name, folder)
    return filled if fill_only else {**in_a_process("measure", name, folder), **filled}


def rows_in(folder: Path, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The row of each engine, printed as it comes; the vectors are made unless they are there."""
    asked = {name: getattr(given, name) for name in ("entries", "width", "queries", "hard")} | {"filters": [*FILTERS]}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / TRUTHS).exists():  # written last
        write_vectors(folder, given.entries, given.width, given.queries, given.hard)
        (folder / MADE).write_text(json.dumps(asked))
    held = json.loads((folder / MADE).read_text()) if (folder / MADE).exists() else "vectors of an earlier benchmark"
    if held != asked:
        raise SystemExit(f"{folder} holds {held}, not {asked}; give these, or another folder")
    rows = {}
    for name in given.engines:
        rows[name] = engine_row(name, folder, given.fill_only)
        print(name, json.dumps(rows[name]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--hard", action="store_true", help="vectors and filters that an index finds hard")
    parser.add_argument("--engines", nargs="+", default=["flat", "edge", "faiss-flat", "faiss-hnsw"])
    parser.add_argument("--folder", type=Path, help="where vectors and engines are written and stay; else temporary")
    parser.add_argument("--fill-only", action="store_true")
    parser.add_argument("--fill", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.fill:
        return print(json.dumps(fill(given.fill, given.folder)))
    if given.measure:
        return print(json.dumps(measure_here(given.measure, given.folder)))
    from benchmarks.harness import machine  # here, since it imports torch

    with tempfile.TemporaryDirectory() as made:
        rows = rows_in(given.folder or Path(made), given)
    about = {"hard": given.hard, "entries": given.entries, "width": given.width, "queries": given.queries, "k": K}
    print(json.dumps({"machine": machine(), **about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
