"""Search in the stores: p50, p95 and recall@10 of flat and edge, with and without a filter, beside FAISS if installed.

By hand: ``python -m benchmarks.stores --entries 200000 --width 256``; not a part of ``make bench``. Printed as JSON,
with the machine. The vectors are synthetic: 2,000 clusters in a subspace of 48 dimensions, with noise in all, since
uniformly random vectors have no near neighbours; queries are of the same distribution and not stored. Recall is counted
against the exact search. FAISS (HNSW, M = 32, ef = 128, and the exact index) has no payload and no filter.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import machine
from clasp.search.edge_store import EdgeStore
from clasp.search.engine import UpdatableStore
from clasp.search.flat_store import FlatStore
from clasp.search.metadata_filter import MetadataFilters, parse_filter

CLUSTERS, DIMENSIONS, NOISE, K, CHUNK = 2_000, 48, 0.15, 10, 2_000
FILTER = "year>=2018"  # one entry in five
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


def metadata(number: int) -> dict[str, Any]:
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
        "meta": {"year": 2010 + number % 10, "camera": "Leica" if number % 3 else "Nikon"},
    }


def fill(store: UpdatableStore, values: np.ndarray) -> float:
    """Add all vectors and close; seconds."""
    began = time.perf_counter()
    for start in range(0, len(values), CHUNK):
        part = range(start, min(start + CHUNK, len(values)))
        store.add([str(n) for n in part], torch.from_numpy(values[part.start : part.stop]), [*map(metadata, part)])
    store.close()
    return time.perf_counter() - began


def measure(search: Search, queries: np.ndarray, truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """One query at a time, after ten to warm up."""
    for query in queries[:10]:
        search(query)
    seconds, recall = [], []
    for query, expected in zip(queries, truth, strict=True):
        began = time.perf_counter()
        found = search(query)
        seconds.append(time.perf_counter() - began)
        recall.append(len(set(found) & set(expected)) / max(1, len(expected)))
    p50, p95 = np.quantile(seconds, (0.5, 0.95)) * 1e3
    return {"p50_ms": round(float(p50), 3), "p95_ms": round(float(p95), 3), "recall": round(float(np.mean(recall)), 4)}


def exact(values: np.ndarray, queries: np.ndarray, allowed: np.ndarray) -> list[list[str]]:
    """The ids of the nearest among the allowed rows."""
    rows = np.flatnonzero(allowed)
    return [[str(n) for n in rows[np.argsort(-(values[rows] @ query), kind="stable")[:K]]] for query in queries]


def faiss_rows(values: np.ndarray, queries: np.ndarray, truth: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Both indexes of FAISS, in memory."""
    if find_spec("faiss") is None:
        return {"faiss": "not installed"}
    import faiss  # type: ignore[import-not-found]

    made = {"faiss flat": faiss.IndexFlatIP(values.shape[1])}
    made["faiss hnsw"] = faiss.IndexHNSWFlat(values.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    made["faiss hnsw"].hnsw.efSearch = 128
    rows = {}
    for name, index in made.items():
        began = time.perf_counter()
        index.add(values)
        filled = time.perf_counter() - began
        found = measure(lambda query, index=index: [str(n) for n in index.search(query[None], K)[1][0]], queries, truth)
        rows[name] = {**found, "fill_s": round(filled, 1)}
    return rows


def store_row(name: str, folder: Path, values: np.ndarray, queries: np.ndarray, truths: Sequence[Any]) -> dict:
    """Fill, reopen, search without and with the filter."""
    make: Callable[[Path], UpdatableStore] = {"flat": FlatStore, "edge": EdgeStore}[name]
    filled = fill(make(folder), values)
    began = time.perf_counter()
    store = make(folder)
    opened = time.perf_counter() - began
    where = MetadataFilters((parse_filter(FILTER),))

    def ask(query: np.ndarray, where: MetadataFilters | None = None) -> list[str]:
        return [hit.id for hit in store.search(torch.from_numpy(query)[None], K, where)[0]]

    plain = measure(ask, queries, truths[0])
    filtered = measure(lambda query: ask(query, where), queries, truths[1])
    store.close()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    facts = {"fill_s": round(filled, 1), "open_s": round(opened, 2), "disk_mb": size // 2**20, "peak_mb": round(peak)}
    return {**plain, f"with {FILTER}": filtered, **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=200)
    given = parser.parse_args()
    values, queries = synthetic(given.entries, given.width, 1), synthetic(given.queries, given.width, 2)
    years = np.arange(given.entries) % 10 >= 8
    truths = [exact(values, queries, allowed) for allowed in (np.ones(given.entries, bool), years)]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("flat", "edge"):
            rows[name] = store_row(name, Path(folder) / name, values, queries, truths)
            print(name, json.dumps(rows[name]), flush=True)
    rows |= faiss_rows(values, queries, truths[0])
    print(json.dumps({"machine": machine(), **vars(given), "k": K, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
