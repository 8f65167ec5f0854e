"""The engines of a store by name, where each keeps the index of a run, and which one suits a collection of a size.

Input: ``flat``, ``edge``, the address of a Qdrant collection or ``package.module:Name``. Output: an open
``UpdatableStore``. Note: an engine from outside is called with its folder, as ours are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from clasp.data.formats.rows import shorten
from clasp.data.plugins import import_named
from clasp.plain_types import UserError
from clasp.search.edge_store import EdgeStore, has_edge_extra
from clasp.search.engine import UpdatableStore
from clasp.search.flat_store import FlatStore
from clasp.search.qdrant_store import QdrantStore, split_address

STORES: dict[str, Callable[[Path], UpdatableStore]] = {"flat": FlatStore, "edge": EdgeStore}
STORE_FORMS = "flat, edge, http://HOST:6333/COLLECTION or package.module:Name"
FLAT_ENTRIES = 300_000
"""Entries up to which an exhaustive search is suggested: it reads all vectors for each query, 300 MB at width 256"""


def check_store_name(name: str) -> None:
    """``UserError`` for a name that is none of ``STORE_FORMS``."""
    if is_address(name):
        split_address(name)
    elif name not in STORES and (":" not in name or "/" in name):
        raise UserError(f"{shorten(name)} is not an engine of a store; there are {STORE_FORMS}")


def is_outside(name: str) -> bool:
    """Whether the name is ``package.module:Name``."""
    return ":" in name and not is_address(name)


def is_address(name: str) -> bool:
    """Whether the name is the address of a server."""
    return "://" in name


def store_folder(run: Path, name: str) -> Path:
    """Where an engine keeps the index of a run; for a server, the folder of the write lock."""
    if name == "flat":
        return run / "index"
    return run / ("index-server" if is_address(name) else f"index-{name.replace(':', '.')}")


def open_store(run: Path, name: str) -> UpdatableStore:
    """The index of a run in this engine; empty if there is none yet. ``UserError`` if the extra is missing."""
    check_store_name(name)
    if is_address(name):
        return QdrantStore.at(name)
    make = STORES[name] if name in STORES else import_named(name, "store")
    return make(store_folder(run, name))


def delete_store(run: Path, name: str) -> None:
    """Delete the index of a run in this engine: the folder, or the collection of the server."""
    if is_address(name):
        store = open_store(run, name)
        store.clear()
        store.close()
    shutil.rmtree(store_folder(run, name), ignore_errors=True)


def suggest_store(entries: int) -> tuple[str, str]:
    """The engine for a new index of so many entries, and why."""
    if entries <= FLAT_ENTRIES:
        return "flat", f"flat: up to {FLAT_ENTRIES:,} images an exact scan is fast enough"
    if has_edge_extra():
        return "edge", f"edge: {entries:,} images are more than {FLAT_ENTRIES:,}, where an HNSW index is faster"
    return "flat", f"flat, though {entries:,} images are many for a scan: edge needs pip install 'clasp-vl[edge]'"
