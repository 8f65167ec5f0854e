"""A search server over the toy world: drawings of five colours, an embedding model of colours, in a thread of its own.

In: a folder. Out: a ``SearchService``, its application, and the address where uvicorn answers for it.
"""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from clasp.data.pairs import FileSource
from clasp.search.background import Background, BackgroundCaption, BackgroundFacts
from clasp.search.engine import SearchEngine, UpdatableStore
from clasp.search.flat_store import FlatStore
from clasp.search.indexer import Indexer
from clasp.serve.app import AppSettings, CommandAccess, build_app
from clasp.serve.editor import IndexEditor
from clasp.serve.guard import AccessPolicy
from clasp.serve.limits import ServeLimits
from clasp.serve.metrics import ServerMetrics
from clasp.serve.service import OpenedIndex, SearchService
from clasp.types import Caption, Pair
from toydata import COLOURS, toys
from toysearch import model

KEY = "the key of the run"
HOSTILE_CAPTION = "<img src=x onerror=\"document.title='owned'\"> of a circle"
LIMITS = ServeLimits(upload_bytes=200_000, pixels=4_000_000, text_chars=200, k=100, parts=8, texts=20, seconds=10.0)


class ToyIndex:
    """An index in a folder: 50 drawings, none of them purple; the first is there four times, one caption is markup."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.version, self.model = folder, 0, model()
        (folder / "pictures").mkdir(parents=True)
        drawings = [toy for toy in toys(60) if toy.colour != "purple"]
        self.pairs = []
        for number, toy in enumerate([drawings[0], drawings[0], drawings[0], *drawings]):
            name = f"{toy.shape}/{number:02}-{toy.colour}.png"
            path = folder / "pictures" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(toy.png)
            about = {"year": 2000 + number % 5, "camera": "Nikon" if number % 2 else "Leica"}
            caption = HOSTILE_CAPTION if number == 10 else toy.caption
            self.pairs.append(Pair(name, FileSource(str(path)), (Caption(caption, "en"),), name, about))
        store = FlatStore(folder / "index")
        Indexer(SearchEngine(self.model, store)).index(self.pairs)
        store.close()

    def open(self) -> OpenedIndex:
        """The index, with a background of the six colours whose threshold lies between there and not there."""
        engine = SearchEngine(self.model, FlatStore(self.folder / "index"))
        captions = self.model.encode_text(list(COLOURS)).numpy()
        facts = BackgroundFacts(self.model.fingerprint, len(self.pairs), 1.05, 0.2, 0.99999)
        return OpenedIndex(
            engine, Background(captions, facts, tuple(BackgroundCaption(name, name) for name in COLOURS))
        )

    def refreshed(self, opened: OpenedIndex, store: UpdatableStore) -> OpenedIndex:
        return opened._replace(engine=opened.engine.over(store))

    @contextmanager
    def writer(self, opened: UpdatableStore) -> Iterator[UpdatableStore]:
        assert isinstance(opened, FlatStore)
        store = opened.fork()
        try:
            yield store
        finally:
            store.release()


def toy_service(folder: Path, limits: ServeLimits = LIMITS) -> SearchService:
    """The service over a new index in a folder."""
    return SearchService(ToyIndex(folder), folder / "thumbnails", limits, ServerMetrics())


def toy_app(service: SearchService, policy: AccessPolicy | None = None, editor: IndexEditor | None = None) -> ASGIApp:
    """The application, open to this machine unless a policy is given."""
    command = CommandAccess(KEY, lambda title, answer: title.encode())
    return build_app(service, AppSettings("toys", policy or AccessPolicy(), command, editor))


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The address where uvicorn answers, in a thread."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none", http="h11"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until_it_answers(address: str) -> None:
    """A server's address is recorded just before it accepts requests."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=5).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
