"""A collection of a Qdrant server or cluster, by its address: for collections larger than one machine.

Input: ``http://host:6333/COLLECTION``. Output: an ``UpdatableStore`` (``QdrantStore``). Note: writes are acknowledged
by the server (``wait=true``). The model is recorded in the metadata of the collection, so its server must be of version
1.16 or later. An API key is read from the environment variable ``QDRANT_API_KEY`` and never stored. Several processes
may read and write; one id is one point, so what two of them add at once is stored once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Float

from clasp.errors import counted
from clasp.plain_types import UserError
from clasp.search.payload import ENTRY, ORDER, TERMS, Condition, HasTerm, InRange, without_absent
from clasp.search.point_store import FoundPoint, PointStore, ReadPoint, StoredPoint
from clasp.search.stored_model import StoredModel

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

_EXTRA = ("qdrant_client", "urllib3")
_EF, _OVERSAMPLING = 128, 2.0  # candidates of a search in the HNSW index; int8 candidates scored again, per hit
_EXACT_FROM = 10_000  # candidates; a walk of the index would visit so many nodes that a scan is faster
_SCROLL = 10_000
_SECONDS = 60


class QdrantStore(PointStore):
    """A collection of a server. ``UserError`` if the extra is missing, or the server does not answer."""

    def __init__(self, client: QdrantClient, collection: str, label: str = "") -> None:
        super().__init__(_QdrantCollection(client, collection, label or collection))

    @classmethod
    def at(cls, address: str) -> QdrantStore:
        """The collection at an address such as ``http://127.0.0.1:6333/photos``."""
        url, collection = split_address(address)
        require_qdrant_extra()
        from qdrant_client import QdrantClient

        key = os.environ.get("QDRANT_API_KEY")
        # without its check of versions, which only warns
        client = QdrantClient(url=url, api_key=key, timeout=_SECONDS, check_compatibility=False)
        return cls(client, collection, address)


def require_qdrant_extra() -> None:
    """``UserError`` if the packages of the extra are not installed."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UserError(f"a Qdrant server needs {', '.join(missing)}; type: pip install 'clasp-vl[qdrant]'")


def split_address(address: str) -> tuple[str, str]:
    """Server and collection of an address; ``UserError`` if it has not both."""
    parts = urlsplit(address)
    collection = parts.path.strip("/")
    if parts.scheme not in ("http", "https") or not parts.netloc or not collection or "/" in collection:
        raise UserError(f"{address}: a Qdrant collection is given as http://HOST:6333/COLLECTION")
    return f"{parts.scheme}://{parts.netloc}", collection


class _QdrantCollection:
    """A collection of a server; see ``PointCollection``."""

    def __init__(self, client: QdrantClient, name: str, label: str) -> None:
        self.label = label
        self._client, self._name = client, name
        self._width, self._model = 0, StoredModel()
        self._indexed: set[str] = set()
        self._refresh()

    @property
    def width(self) -> int:
        return self._width

    @property
    def model(self) -> StoredModel:
        return self._model

    def create(self, width: int, model: StoredModel) -> None:
        from qdrant_client import models

        self.drop()
        int8 = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
        with self._errors("create it"):
            self._client.create_collection(
                self._name,
                vectors_config=models.VectorParams(size=width, distance=models.Distance.DOT, on_disk=True),
                quantization_config=models.ScalarQuantization(scalar=int8),
                metadata={"model": model.fingerprint, "name": model.name},
            )
            self._create_index(TERMS, models.PayloadSchemaType.KEYWORD)
            self._create_index(ORDER, models.PayloadSchemaType.INTEGER)
        self._refresh()

    def drop(self) -> None:
        with self._errors("empty it"):
            if self._client.collection_exists(self._name):
                self._client.delete_collection(self._name)
        self._width, self._model, self._indexed = 0, StoredModel(), set()

    def count(self) -> int:
        with self._errors("count its entries"):
            return self._client.count(self._name, exact=True).count

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        from qdrant_client import models

        made = [models.PointStruct(id=point.id, vector=point.vector, payload=point.payload) for point in points]
        with self._errors(f"write {counted(len(points), 'entry')}"):
            self._client.upsert(self._name, made, wait=True)

    def remove(self, ids: Sequence[str]) -> None:
        from qdrant_client import models

        with self._errors(f"delete {counted(len(ids), 'entry')}"):
            self._client.delete(self._name, models.PointIdsList(points=list(ids)), wait=True)

    def index_ranges(self, keys: set[str]) -> None:
        from qdrant_client import models

        for key in sorted(keys - self._indexed):
            with self._errors(f"index {key}"):
                self._create_index(key, models.PayloadSchemaType.FLOAT)

    def commit(self) -> None:
        """Nothing: every write waited for the server."""

    def payloads(self, ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        with self._errors("read it"):
            records = self._client.retrieve(self._name, list(ids), with_payload=True, with_vectors=False)
        return {str(record.id): record.payload or {} for record in records}

    def vectors(self, ids: Sequence[str]) -> dict[str, list[float]]:
        with self._errors("read it"):
            records = self._client.retrieve(self._name, list(ids), with_payload=False, with_vectors=True)
        return {str(record.id): record.vector for record in records}  # pyright: ignore[reportReturnType]

    def points(self, ids: Sequence[str]) -> dict[str, ReadPoint]:
        with self._errors("read it"):
            records = self._client.retrieve(self._name, list(ids), with_payload=[ENTRY], with_vectors=True)
        return {
            str(record.id): ReadPoint(record.payload or {}, record.vector)  # pyright: ignore[reportArgumentType]
            for record in records
        }

    def orders(self) -> Iterator[tuple[int, str]]:
        offset = None
        while True:
            with self._errors("read it"):
                records, offset = self._client.scroll(
                    self._name, limit=_SCROLL, offset=offset, with_payload=[ORDER], with_vectors=False
                )
            yield from ((int((record.payload or {})[ORDER]), str(record.id)) for record in records)
            if offset is None:
                return

    def nearest(
        self, queries: Float[np.ndarray, "q E"], limit: int, conditions: Sequence[Condition]
    ) -> list[list[FoundPoint]]:
        from qdrant_client import models

        narrowed = self._without_absent(conditions)
        parts = [[_qdrant_condition(each) for each in alternatives] for alternatives in narrowed]
        must = [one if not others else models.Filter(should=[one, *others]) for one, *others in parts]
        params = models.SearchParams(
            hnsw_ef=max(_EF, limit),
            exact=limit > _EXACT_FROM,
            quantization=models.QuantizationSearchParams(rescore=True, oversampling=_OVERSAMPLING),
        )
        requests = [
            models.QueryRequest(
                query=query.tolist(),
                filter=models.Filter(must=must) if must else None,  # pyright: ignore[reportArgumentType]
                params=params,
                limit=limit,
                with_payload=False,
            )
            for query in queries
        ]
        with self._errors("search it"):
            answers = self._client.query_batch_points(self._name, requests)
        return [[FoundPoint(str(point.id), point.score) for point in answer.points] for answer in answers]

    def close(self) -> None:
        self._client.close()  # the server builds its index by itself

    # --- inside ------------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Read width, model and indexed keys from the server."""
        with self._errors("open it"):
            if not self._client.collection_exists(self._name):
                return
            info = self._client.get_collection(self._name)
        metadata, vectors = info.config.metadata or {}, info.config.params.vectors
        if "model" not in metadata or vectors is None or isinstance(vectors, dict):
            raise UserError(f"{self.label} is a collection of something else; give another name: http://HOST/NAME")
        self._width, self._indexed = vectors.size, set(info.payload_schema)
        self._model = StoredModel(metadata["model"], metadata["name"])

    def _without_absent(self, conditions: Sequence[Condition]) -> Sequence[Condition]:
        """See ``without_absent``; the keys are read again, since another process may have added some."""
        if not any(isinstance(each, InRange) for condition in conditions for each in condition):
            return conditions
        with self._errors("search it"):
            keys = self._client.get_collection(self._name).payload_schema
        return without_absent(conditions, keys) if TERMS in keys else conditions  # the local mode has no indexes

    def _create_index(self, key: str, schema: models.PayloadSchemaType) -> None:
        self._client.create_payload_index(self._name, key, schema, wait=True)
        self._indexed.add(key)

    @contextmanager
    def _errors(self, intent: str) -> Iterator[None]:
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        try:
            yield
        except (ApiException, QdrantException, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.label}: cannot {intent}: {reason}") from error


def _qdrant_condition(condition: HasTerm | InRange) -> models.FieldCondition:
    from qdrant_client import models

    if isinstance(condition, HasTerm):
        return models.FieldCondition(key=TERMS, match=models.MatchValue(value=condition.term))
    return models.FieldCondition(key=condition.key, range=models.Range(gte=condition.low, lte=condition.high))
