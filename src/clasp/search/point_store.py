"""A store over a vector database: entries as points, filters as conditions that are checked again, ties ordered by id.

Input: a ``PointCollection`` (see ``edge_store`` and ``qdrant_store``). Output: an ``UpdatableStore`` that answers as
``FlatStore`` does, up to what the index of the collection misses. Note: candidates are scored again in float64 from
their vectors, which are stored as given. Conditions narrow the search and the filter itself decides; where too few
candidates pass, the search is repeated for more: a filter without conditions may read a large part of the collection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float

from clasp.plain_types import Hit, UserError
from clasp.search.payload import (
    Condition,
    compile_filters,
    decode_payload,
    encode_payload,
    point_id,
    range_keys,
)
from clasp.search.stored_model import StoredModel, row_norms

_MetadataFilter = Callable[[Mapping[str, Any]], bool]

_Item = TypeVar("_Item")

_AT_ONCE = 1000  # points in one request
_MORE = 16  # candidates beyond k, so that one search usually reveals whether the k-th is tied
_MOST_TIES = 4096  # candidates beyond k among which ties are looked for


class StoredPoint(NamedTuple):
    """A point to be written: UUID, unit vector, payload."""

    id: str
    vector: list[float]
    payload: dict[str, Any]


class FoundPoint(NamedTuple):
    """A candidate of a search."""

    id: str
    score: float


class ReadPoint(NamedTuple):
    """A point as it is read for a hit: of its payload the entry, and its vector."""

    payload: Mapping[str, Any]
    vector: Sequence[float]


@runtime_checkable
class PointCollection(Protocol):
    """What a vector database does for ``PointStore``. What is written is durable after ``commit``."""

    label: str
    """How error messages name it"""

    @property
    def width(self) -> int:
        """Width of the vectors; 0 for a collection that does not exist."""
        ...

    @property
    def model(self) -> StoredModel:
        """The model recorded when the collection was created."""
        ...

    def create(self, width: int, model: StoredModel) -> None:
        """Replace what there is by an empty collection."""
        ...

    def drop(self) -> None:
        """Delete the collection, if there is one."""
        ...

    def count(self) -> int:
        """Number of points."""
        ...

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        """Write points; those of the same UUID are replaced."""
        ...

    def remove(self, ids: Sequence[str]) -> None:
        """Delete points."""
        ...

    def index_ranges(self, keys: set[str]) -> None:
        """Index these keys of the payload for ``InRange``, those that are not yet."""
        ...

    def commit(self) -> None:
        """Return when all writes are durable."""
        ...

    def payloads(self, ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """Payload by UUID, without those that are not stored."""
        ...

    def vectors(self, ids: Sequence[str]) -> dict[str, list[float]]:
        """Vector by UUID, without those that are not stored."""
        ...

    def points(self, ids: Sequence[str]) -> dict[str, ReadPoint]:
        """Entry and vector by UUID, without those that are not stored."""
        ...

    def orders(self) -> Iterator[tuple[int, str]]:
        """``order`` of the payload, and UUID, of every point."""
        ...

    def nearest(
        self, queries: Float[np.ndarray, "q E"], limit: int, conditions: Sequence[Condition]
    ) -> list[list[FoundPoint]]:
        """The points with the largest dot product with each query, best first."""
        ...

    def close(self) -> None:
        """Release the collection; after writes, build its index."""
        ...


class PointStore:
    """A ``Store`` over a ``PointCollection``. An id is stored once, however often it is added."""

    def __init__(self, collection: PointCollection) -> None:
        self._collection = collection
        self._claimed: StoredModel | None = None
        self._order = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._collection.label!r}, {self.count()} vectors)"

    @property
    def model(self) -> str:
        """Fingerprint of the model that computed the vectors; empty if none is recorded."""
        return (self._claimed or self._collection.model).fingerprint

    @property
    def model_name(self) -> str:
        """Its name, for messages."""
        return (self._claimed or self._collection.model).name

    def claim(self, model: str, name: str) -> None:
        """Record the model of the vectors, written with the first. ``UserError`` if the stored ones are another's."""
        claimed = StoredModel(model, name)
        if self.count():
            self._collection.model.require_same(claimed, self._collection.label)
        self._claimed = claimed

    def count(self) -> int:
        """Number of ids."""
        return self._collection.count() if self._collection.width else 0

    def close(self) -> None:
        """Build the index over what was written, and release the collection."""
        self._collection.close()

    # --- reading -----------------------------------------------------------------------------------------------------

    def scan(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every id with its metadata, in the order they were added."""
        if not self._collection.width:
            return
        ids = [name for _, name in sorted(self._collection.orders())]
        for some in _chunks(ids):
            payloads = self._collection.payloads(some)
            yield from (decode_payload(payloads[name]) for name in some if name in payloads)

    def vectors(self, ids: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """The unit vectors of these ids; ``KeyError`` for an id that is not stored."""
        rows = self._by_id(ids, self._collection.vectors)
        return np.array(rows, np.float32).reshape(len(rows), self._collection.width)

    def metadata(self, ids: Sequence[str]) -> list[Mapping[str, Any]]:
        """The metadata of these ids; ``KeyError`` for an id that is not stored."""
        return [decode_payload(payload)[1] for payload in self._by_id(ids, self._collection.payloads)]

    def search(
        self, queries: Float[np.ndarray, "q E"], k: int, where: _MetadataFilter | None = None
    ) -> list[list[Hit]]:
        """The ``k`` nearest of each query by cosine, best first; fewer if the store has fewer.

        ``where`` filters by metadata. ``UserError`` for queries of another width.
        """
        assert k >= 0, f"k = {k}"
        if not self.count() or k == 0:
            return [[] for _ in queries]
        self._require_width(queries.shape[1], "the query is")
        exact = np.asarray(queries, np.float64)
        exact = exact / row_norms(exact, [f"query {number}" for number in range(len(exact))])[:, None]
        conditions = compile_filters(where)
        first = self._collection.nearest(exact, k + _MORE, conditions)
        return [self._best(query, found, k, where, conditions) for query, found in zip(exact, first, strict=True)]

    def _best(
        self,
        query: Float[np.ndarray, " E"],
        found: list[FoundPoint],
        k: int,
        where: _MetadataFilter | None,
        conditions: Sequence[Condition],
    ) -> list[Hit]:
        """The hits of one query among candidates; more are fetched until the k-th hit has no tie beyond the last."""
        margin, limit = 4 * len(query) * float(np.finfo(np.float32).eps), k + _MORE
        read: dict[str, Hit | None] = {}
        while True:
            hits, place, floor = [], 0, -np.inf
            while place < len(found) and found[place].score >= floor:  # no more than needed: each is of a page of disk
                some = found[place : place + max(k - len(hits), place)]
                self._read(query, [point.id for point in some], where, read)
                for point in some:
                    hit = read[point.id]
                    if hit is not None:
                        hits.append(hit)
                        if len(hits) == k:
                            floor = point.score - margin
                place += len(some)
            if len(found) < limit or found[-1].score < floor or (len(hits) >= k and limit > k + _MOST_TIES):
                return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]
            limit *= 4
            found = self._collection.nearest(query[None], limit, conditions)[0]

    def _read(
        self,
        query: Float[np.ndarray, " E"],
        ids: Sequence[str],
        where: _MetadataFilter | None,
        read: dict[str, Hit | None],
    ) -> None:
        """The hits of these points into ``read``, where they are not; ``None`` for one that does not pass the filter,
        or has been deleted meanwhile."""
        missing = [name for name in ids if name not in read]
        if not missing:
            return
        points = self._collection.points(missing)
        for point in missing:
            read[point] = None
            if point not in points:
                continue
            payload, vector = points[point]
            name, meta = decode_payload(payload)
            if where is None or where(meta):
                row = np.asarray(vector, np.float64)
                cosine = float((row * query).sum() / np.sqrt((row * row).sum()))
                read[point] = Hit(name, min(1.0, max(-1.0, cosine)), meta)

    def _by_id(self, ids: Sequence[str], fetch: Callable[[Sequence[str]], Mapping[str, Any]]) -> list[Any]:
        points = [point_id(name) for name in ids]
        found: dict[str, Any] = {}
        if self._collection.width:
            for some in _chunks(list(dict.fromkeys(points))):
                found.update(fetch(some))
        for name, point in zip(ids, points, strict=True):
            if point not in found:
                raise KeyError(name)
        return [found[point] for point in points]

    def _require_width(self, width: int, given: str) -> None:
        if width != self._collection.width:
            raise UserError(f"{self._collection.label} holds vectors {self._collection.width} wide; {given} {width}")

    # --- writing -----------------------------------------------------------------------------------------------------

    def add(self, ids: Sequence[str], vectors: Float[np.ndarray, "n E"], meta: Sequence[Mapping[str, Any]]) -> None:
        """Store vectors, normalised to unit length, under their ids; an id that is already stored is replaced.

        On return the data is durable; of an interrupted call some entries may be stored, each whole. ``meta`` is plain
        data (JSON). ``UserError`` for vectors of another width, or one that is zero or not finite.
        """
        assert len(ids) == len(vectors) == len(meta), f"{len(ids)} ids, {len(vectors)} vectors, {len(meta)} metadata"
        if not ids:
            return
        values = np.asarray(vectors, np.float32)
        values = (values / row_norms(values, ids)[:, None]).astype(np.float32)
        if not self.count():  # an empty store takes any width, and any model
            self._collection.create(values.shape[1], self._claimed or self._collection.model)
        elif self._claimed is not None:  # another process may have written since it was claimed
            self._collection.model.require_same(self._claimed, self._collection.label)
        self._require_width(values.shape[1], "these are")
        self._order = max(self._order, time.time_ns())
        points: dict[str, StoredPoint] = {}
        for name, row, about in zip(ids, values, meta, strict=True):
            self._order += 1
            point = point_id(name)
            points[point] = StoredPoint(point, row.tolist(), encode_payload(name, about, self._order))
        self._collection.index_ranges(set().union(*(range_keys(point.payload) for point in points.values())))
        for some in _chunks(list(points.values())):
            self._collection.upsert(some)
        self._collection.commit()

    def delete(self, ids: Iterable[str]) -> int:
        """Delete these ids, ignoring those that are not stored. Returns how many were deleted."""
        deleted = 0
        points = [point_id(name) for name in dict.fromkeys(ids)] if self._collection.width else []
        for some in _chunks(points):
            known = list(self._collection.payloads(some))
            if known:
                self._collection.remove(known)
            deleted += len(known)
        if deleted:
            self._collection.commit()
        return deleted

    def clear(self) -> None:
        """Delete all entries, and the recorded model."""
        self._collection.drop()
        self._claimed = None


def _chunks(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    return (items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE))
