"""An embedded vector index on disk: qdrant-edge, with HNSW and int8 vectors, for more entries than a scan is good for.

Input: a folder. Output: an ``UpdatableStore`` (``EdgeStore``). Note: one process at a time has it open, readers too. A
write is acknowledged after the library's ``flush``. Its HNSW index (Malkov & Yashunin 2018, arXiv:1603.09320) is built
by ``close`` after writes, only over segments of more than ``_INDEX_KILOBYTES`` of vectors (about 20,000 entries of
width 256); below that, and until then, a search is exhaustive and exact. In the index vectors are int8, and the best
candidates are scored again with the float32 vectors on disk; where fewer than ``_SCAN_KILOBYTES`` of entries are
stored, or pass a filter, all of these are candidates. It has no further links between entries of equal metadata, which
take most of the time of building: else, with a filter, neighbours of neighbours are visited, too (ACORN: Patel et al.
2024, arXiv:2403.04871). Terms are stored as hashes, which a walk compares faster than text. ``manifest.json`` names the
current shard and is written last, atomically: a kill while a shard is created or dropped leaves one that is ignored.
Long, since all calls of qdrant-edge are here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from clasp.errors import counted
from clasp.plain_types import UserError
from clasp.search.candidates import MEASURED_HITS, fewest_candidates
from clasp.search.manifest import REBUILD_HINT, lock_store, write_at
from clasp.search.payload import ENTRY, ORDER, TERMS, Condition, HasTerm, InRange, without_absent
from clasp.search.point_store import FoundPoint, PointStore, ReadPoint, StoredPoint
from clasp.search.stored_model import StoredModel

if TYPE_CHECKING:
    import qdrant_edge

_MANIFEST = "manifest.json"
_EF_CONSTRUCT, _LINKS = 128, 16  # of HNSW: candidates of building, links of a node
_EF = (320, 640, 1_280, 2_560)  # candidates of a search: as many as the index needs, measured with _PROBES queries
_PROBES = 48
_CHANGE = 0.1  # fraction by which the number of entries may change before this is measured again
_INDEX_KILOBYTES = 20_000  # of float32 vectors, from which a segment gets an index
_SCAN_KILOBYTES = 100_000  # of float32 vectors; where fewer are stored, or pass a filter, these are scored one by one
_ONE_SEGMENT = 1_000_000_000  # kilobytes
_OVERSAMPLING = 2.0  # int8 candidates scored again, per hit
_EXACT_FROM = 10_000  # candidates; a walk of the index would visit so many nodes that a scan is faster
_SCROLL = 10_000
_FORMAT, _FORMAT_WITH_TEXT_TERMS = 2, 1


@dataclass(frozen=True, slots=True)
class EdgeManifest:
    """The current shard, its width, and the model of its vectors."""

    generation: int = 0
    width: int = 0
    model: str = ""
    name: str = ""
    engine: str = "edge"
    format: int = _FORMAT
    candidates: int = _EF[0]
    measured: int = 0
    """Entries of the index when it was measured how many candidates a search needs; 0: it was not"""


class EdgeStore(PointStore):
    """A folder of vectors with an HNSW index. ``UserError`` if the extra is missing, or another process has it open."""

    def __init__(self, folder: str | Path) -> None:
        require_edge_extra()
        self.folder = Path(os.path.expanduser(folder))
        super().__init__(_EdgeCollection(self.folder))


def require_edge_extra() -> None:
    """``UserError`` if the package of the extra is not installed."""
    if not has_edge_extra():
        raise UserError("the store edge needs qdrant_edge; type: pip install 'clasp-vl[edge]'")


def has_edge_extra() -> bool:
    """Whether the package of the extra is installed."""
    return find_spec("qdrant_edge") is not None


class _EdgeCollection:
    """The shard of a folder; see ``PointCollection``."""

    def __init__(self, folder: Path) -> None:
        self.label = str(folder)
        self._folder = folder
        self._release_lock: Callable[[], Any] | None = None
        self._shard: qdrant_edge.EdgeShard | None = None
        self._count: int | None = None
        self._indexed: set[str] = set()
        self._written = False
        self._manifest = _read_edge_manifest(folder)
        if self._manifest.width:
            self._lock()
            self._manifest = _read_edge_manifest(folder)  # what another process wrote in between
        if self._manifest.width:
            self._load()

    @property
    def width(self) -> int:
        return self._manifest.width

    @property
    def model(self) -> StoredModel:
        return StoredModel(self._manifest.model, self._manifest.name)

    def create(self, width: int, model: StoredModel) -> None:
        import qdrant_edge as edge

        self._lock()
        before = _read_edge_manifest(self._folder)
        self._close_shard()
        new = EdgeManifest(before.generation + 1, width, model.fingerprint, model.name)
        path = self._path(new)
        shutil.rmtree(path, ignore_errors=True)
        config = edge.EdgeConfig(
            vectors=edge.EdgeVectorParams(size=width, distance=edge.Distance.Dot, on_disk=True),
            hnsw_config=edge.HnswIndexConfig(m=_LINKS, ef_construct=_EF_CONSTRUCT, full_scan_threshold=_SCAN_KILOBYTES),
            quantization_config=edge.ScalarQuantizationConfig(edge.ScalarType.Int8, always_ram=True),
            optimizers=edge.EdgeOptimizersConfig(
                default_segment_number=1, max_segment_size=_ONE_SEGMENT, indexing_threshold=_INDEX_KILOBYTES
            ),
        )
        with self._errors("create it"):
            path.mkdir(parents=True)
            self._shard = edge.EdgeShard.create(str(path), config)
            terms = edge.IntegerIndexParams(lookup=True, range=False, on_disk=True, enable_hnsw=False)
            self._shard.update(edge.UpdateOperation.create_field_index(TERMS, terms))
            self._shard.flush()
            self._replace_manifest(new)
        self._indexed, self._count = {TERMS}, None

    def drop(self) -> None:
        if not self._manifest.width:
            return
        self._lock()
        self._close_shard()
        with self._errors("empty it"):
            self._replace_manifest(EdgeManifest(self._manifest.generation + 1))

    def count(self) -> int:
        import qdrant_edge as edge

        if self._count is None:
            with self._errors("count its entries"):
                self._count = self._open_shard.count(edge.CountRequest(exact=True))
        return self._count

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        import qdrant_edge as edge

        made = [edge.Point(point.id, point.vector, self._edge_payload(point.payload)) for point in points]
        self._update(edge.UpdateOperation.upsert_points(made), f"write {counted(len(points), 'entry')}")

    def remove(self, ids: Sequence[str]) -> None:
        import qdrant_edge as edge

        self._update(edge.UpdateOperation.delete_points(list(ids)), f"delete {counted(len(ids), 'entry')}")

    def index_ranges(self, keys: set[str]) -> None:
        import qdrant_edge as edge

        numbers = edge.FloatIndexParams(on_disk=True, enable_hnsw=False)
        for key in sorted(keys - self._indexed):
            self._update(edge.UpdateOperation.create_field_index(key, numbers), f"index {key}")
        self._indexed |= keys

    def commit(self) -> None:
        with self._errors("write to it"):
            self._open_shard.flush()

    def payloads(self, ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        with self._errors("read it"):
            records = self._open_shard.retrieve(list(ids), with_payload=True, with_vector=False)
        return {str(record.id): record.payload or {} for record in records}

    def vectors(self, ids: Sequence[str]) -> dict[str, list[float]]:
        with self._errors("read it"):
            records = self._open_shard.retrieve(list(ids), with_payload=False, with_vector=True)
        return {str(record.id): record.vector for record in records}  # pyright: ignore[reportReturnType]

    def points(self, ids: Sequence[str]) -> dict[str, ReadPoint]:
        with self._errors("read it"):
            records = self._open_shard.retrieve(list(ids), with_payload=[ENTRY], with_vector=True)
        return {
            str(record.id): ReadPoint(record.payload or {}, record.vector)  # pyright: ignore[reportArgumentType]
            for record in records
        }

    def orders(self) -> Iterator[tuple[int, str]]:
        import qdrant_edge as edge

        offset = None
        while True:
            request = edge.ScrollRequest(offset=offset, limit=_SCROLL, with_payload=[ORDER], with_vector=False)
            with self._errors("read it"):
                records, offset = self._open_shard.scroll(request)
            yield from ((int((record.payload or {})[ORDER]), str(record.id)) for record in records)
            if offset is None:
                return

    def nearest(
        self, queries: Float[np.ndarray, "q E"], limit: int, conditions: Sequence[Condition]
    ) -> list[list[FoundPoint]]:
        import qdrant_edge as edge

        where = self._edge_filter(without_absent(conditions, self._indexed))
        candidates = max(self._candidates(filtered=where is not None), limit)
        params = edge.SearchParams(exact=True) if limit > _EXACT_FROM else _walk(candidates)
        with self._errors("search it"):
            return self._query(queries, limit, where, params)

    def close(self) -> None:
        try:
            if self._written and self._shard is not None:
                with self._errors("build its index"):
                    self._shard.optimize()
                    self._shard.flush()
                    self._measure()
        finally:
            self._written = False
            self._close_shard()
            self._unlock()

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _open_shard(self) -> qdrant_edge.EdgeShard:
        """The shard, opened again if the store has been closed."""
        if self._shard is None:
            self._lock()
            self._manifest = _read_edge_manifest(self._folder)
            self._load()
        assert self._shard is not None
        return self._shard

    def _candidates(self, *, filtered: bool) -> int:
        """How many candidates a search of the graph collects: with a filter twice as many, since it misses more then,
        unless the smallest number was enough without one."""
        measured = self._manifest.candidates
        return 2 * measured if filtered and measured > _EF[0] else measured

    def _measure(self) -> None:
        """Record how many candidates a search of this index needs, unless that was measured of nearly as many."""
        import qdrant_edge as edge

        count = self.count()
        walked = self._open_shard.info().indexed_vectors_count * self.width * 4 > _SCAN_KILOBYTES * 1024
        if not walked or abs(count - self._manifest.measured) <= _CHANGE * count:
            return

        def search(queries: Float[np.ndarray, "q E"], candidates: int | None) -> list[list[str]]:
            params = edge.SearchParams(exact=True) if candidates is None else _walk(candidates)
            return [[point.id for point in some] for some in self._query(queries, MEASURED_HITS, None, params)]

        sample = edge.ScrollRequest(limit=3 * _PROBES, with_payload=False, with_vector=True)  # first by id, a hash
        vectors = np.array([record.vector for record in self._open_shard.scroll(sample)[0]], np.float64)
        needed = fewest_candidates(vectors, search, _EF)
        self._replace_manifest(replace(self._manifest, candidates=needed, measured=count))

    def _query(
        self,
        queries: Float[np.ndarray, "q E"],
        limit: int,
        where: qdrant_edge.Filter | None,
        params: qdrant_edge.SearchParams,
    ) -> list[list[FoundPoint]]:
        import qdrant_edge as edge

        requests = [
            edge.QueryRequest(limit=limit, query=edge.Query.Nearest(query.tolist()), filter=where, params=params)
            for query in queries
        ]
        found = self._open_shard.query_batch(edge.QueryBatchRequest(requests))
        return [[FoundPoint(str(point.id), point.score) for point in points] for points in found]

    def _load(self) -> None:
        import qdrant_edge as edge

        path = self._path(self._manifest)
        try:
            if not path.is_dir():
                raise UserError(f"{path} is missing; {REBUILD_HINT}")
            with self._errors(f"open it ({REBUILD_HINT})"):
                self._shard = edge.EdgeShard.load(str(path))
                self._indexed = set(self._shard.info().payload_schema)
        except UserError:
            self._unlock()
            raise
        self._count = None

    def _update(self, operation: qdrant_edge.UpdateOperation, intent: str) -> None:
        with self._errors(intent):
            self._open_shard.update(operation)
        self._count, self._written = None, True

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _lock(self) -> None:
        if self._release_lock is not None:
            return
        with self._errors("write to it"):
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._release_lock = weakref.finalize(self, os.close, lock_store(self._folder))
        except UserError:
            raise UserError(
                f"{self._folder} is open elsewhere, and one process at a time can use a store of the engine edge; "
                "end that command, or clasp serve, first"
            ) from None

    def _unlock(self) -> None:
        if self._release_lock is not None:
            self._release_lock()
            self._release_lock = None

    def _edge_payload(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {**payload, TERMS: [self._term(term) for term in payload.get(TERMS, ())]}

    def _edge_filter(self, conditions: Sequence[Condition]) -> qdrant_edge.Filter | None:
        """All conditions. A filter within a filter is slow (6.3 instead of 0.7 ms where 20,000 entries are scanned), so
        that only what has alternatives is one."""
        import qdrant_edge as edge

        parts = [[self._edge_condition(each) for each in alternatives] for alternatives in conditions]
        must = [one if not others else edge.Filter(should=[one, *others]) for one, *others in parts]
        return edge.Filter(must=must) if must else None  # pyright: ignore[reportArgumentType]

    def _edge_condition(self, condition: HasTerm | InRange) -> qdrant_edge.FieldCondition:
        import qdrant_edge as edge

        if isinstance(condition, HasTerm):
            return edge.FieldCondition(TERMS, match=edge.MatchValue(self._term(condition.term)))
        return edge.FieldCondition(condition.key, range=edge.RangeFloat(gte=condition.low, lte=condition.high))

    def _term(self, term: str) -> int | str:
        """A term as it is stored: 63 bits of its hash, which a search compares faster; as text in a shard of an earlier
        version. Two terms of one hash are told apart by the filter itself."""
        if self._manifest.format == _FORMAT_WITH_TEXT_TERMS:
            return term
        return int.from_bytes(hashlib.sha256(term.encode()).digest()[:8], "big") >> 1

    def _path(self, manifest: EdgeManifest) -> Path:
        return self._folder / f"shard-{manifest.generation}"

    def _replace_manifest(self, new: EdgeManifest) -> None:
        part = self._folder / f"{_MANIFEST}.part"
        write_at(part, 0, [(json.dumps(asdict(new), indent=2) + "\n").encode()])
        os.replace(part, self._folder / _MANIFEST)
        self._manifest, self._count = new, None
        for path in self._folder.glob("shard-*"):
            if not new.width or path != self._path(new):
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _errors(self, intent: str) -> Iterator[None]:
        """qdrant-edge raises plain ``Exception`` for everything."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self._folder}: cannot {intent}: {reason}") from error


def _walk(candidates: int) -> qdrant_edge.SearchParams:
    """The parameters of a walk through the index."""
    import qdrant_edge as edge

    return edge.SearchParams(
        hnsw_ef=candidates,
        quantization=edge.QuantizationSearchParams(rescore=True, oversampling=_OVERSAMPLING),
        acorn=edge.AcornSearchParams(enable=True, max_selectivity=1.0),
    )


def _read_edge_manifest(folder: Path) -> EdgeManifest:
    """The manifest; an empty one for an empty or missing folder. ``UserError`` for one that is not of this engine."""
    path = folder / _MANIFEST
    try:
        manifest = EdgeManifest(**json.loads(path.read_text(encoding="utf-8")))
        if manifest.format not in (_FORMAT, _FORMAT_WITH_TEXT_TERMS) or manifest.engine != "edge":
            raise ValueError
    except FileNotFoundError:
        ours = ("lock", "shard-", _MANIFEST)
        others = [name for name in sorted(os.listdir(folder)) if not name.startswith(ours)] if folder.exists() else []
        if others:
            raise UserError(f"{folder} is not a store: it has no {_MANIFEST}, but {', '.join(others[:3])}") from None
        return EdgeManifest()
    except NotADirectoryError:
        raise UserError(f"{folder} is a file, not the folder of a store") from None
    except (ValueError, TypeError, RecursionError):
        known = ", ".join(field.name for field in fields(EdgeManifest))
        raise UserError(f"{path} is damaged or of another engine (it should give {known}); {REBUILD_HINT}") from None
    return manifest
