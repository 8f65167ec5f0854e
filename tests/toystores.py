"""The three store engines in a folder, for tests that run over all of them.

In: a folder. Out: a function that opens the store in it, again after ``close``. The Qdrant server is the client's local
mode: the same calls, exact search, data in the folder.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from clasp.search.edge_store import EdgeStore
from clasp.search.engine import UpdatableStore
from clasp.search.flat_store import FlatStore
from clasp.search.qdrant_store import QdrantStore


def open_flat(folder: Path) -> UpdatableStore:
    return FlatStore(folder)


def open_edge(folder: Path) -> UpdatableStore:
    return EdgeStore(folder)


def open_qdrant(folder: Path) -> UpdatableStore:
    from qdrant_client import QdrantClient

    return QdrantStore(QdrantClient(path=str(folder)), "pictures", str(folder))


ENGINES = {"flat": open_flat, "edge": open_edge, "qdrant": open_qdrant}
NEEDED = {"flat": (), "edge": ("qdrant_edge",), "qdrant": ("qdrant_client", "urllib3")}


def engine_parameters(*names: str) -> list:
    """The engines as parameters of a test, skipped where their extra is not installed."""
    return [
        pytest.param(
            ENGINES[name],
            id=name,
            marks=[
                pytest.mark.skipif(
                    not all(map(find_spec, NEEDED[name])), reason=f"the extra of the engine {name} is not installed"
                ),
                # its local mode has no payload indexes and no approximate search, and warns about it once
                pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning"),
                pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning"),
            ],
        )
        for name in names or ENGINES
    ]


class OutsideStore(FlatStore):
    """An engine of somebody else."""
