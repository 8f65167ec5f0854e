"""The command ``clasp serve``: the page and the HTTP API over the index of a run.

Input: a run folder, optionally images to index first, and an address. Output: a server until it is stopped. Note:
FastAPI and uvicorn are an extra, imported here inside functions; without them there is one line that names the extra.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from clasp.commands.background import open_background
from clasp.commands.run_store import index_version, open_run_store, recorded_store, server_writer
from clasp.commands.search import contact_sheet_rows, index_images
from clasp.config.build import load
from clasp.models.inference import EmbeddingModel
from clasp.report.contact_sheet import contact_sheet
from clasp.search.answer import SearchAnswer
from clasp.search.background import BACKGROUND_FILE, read_background
from clasp.search.engine import SearchEngine, UpdatableStore
from clasp.search.store_registry import open_store
from clasp.training.run_folder import RunFolder
from clasp.types import MessageCallback, ProgressFactory, UserError

if TYPE_CHECKING:
    from clasp.serve.service import OpenedIndex

_EXTRA = ("fastapi", "uvicorn", "python_multipart")


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Where the server listens, and who may use it for what."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    hosts: Sequence[str] = ()
    """Further names by which it is reached, behind a proxy"""
    uploads: Path | None = None
    """Folder in which images that requests add are saved; ``None``: requests cannot change the index"""


def require_serve_extra() -> None:
    """``UserError`` if the packages of the extra are not installed."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UserError(f"clasp serve needs {', '.join(missing)}; type: pip install 'clasp-vl[serve]'")


def serve_run(
    run: Path, pictures: str | None, settings: ServeSettings, *, say: MessageCallback, bar: ProgressFactory
) -> None:
    """Index ``pictures`` if given, load the model once, and answer until stopped. ``UserError`` before that."""
    require_serve_extra()
    from clasp.serve.app import AppSettings, CommandAccess, build_app
    from clasp.serve.editor import IndexEditor
    from clasp.serve.guard import AccessPolicy
    from clasp.serve.limits import ServeLimits
    from clasp.serve.metrics import ServerMetrics
    from clasp.serve.server import bind_address, run_server
    from clasp.serve.service import SearchService
    from clasp.serve.upload_folder import UploadFolder
    from clasp.serve.warm_server import new_key

    RunFolder(run).recipe()
    if pictures is None and settings.uploads is None and recorded_store(run) is None:
        raise UserError(f"{run} has no index yet; name the images: clasp serve {run} --pictures FOLDER")
    uploads = None if settings.uploads is None else UploadFolder(settings.uploads)
    address = bind_address(settings.host, settings.port, settings.token)
    model = load(run)
    if pictures is not None:
        say(str(index_images(run, pictures, bar=bar, model=model)))
    index = RunIndex(run, model) if uploads is None else ChangingRunIndex(run, model)
    service = SearchService(index, run / "thumbnails", ServeLimits(), ServerMetrics())
    key = new_key()
    policy = AccessPolicy(settings.host, settings.token, settings.hosts)
    editor = None if uploads is None else IndexEditor(service, uploads)
    app = build_app(service, AppSettings(run.resolve().name, policy, CommandAccess(key, draw_answer), editor))
    say(f"{service.count():,} images; open {address.url} in a browser; Ctrl-C stops")
    try:
        run_server(app, address, run, key, say)
    finally:
        service.close()


class RunIndex:
    """The index of a run, for a model that is already loaded."""

    def __init__(self, run: Path, model: EmbeddingModel) -> None:
        self.run, self.model = run, model

    @property
    def version(self) -> object:
        """Times at which the index and its background were last written."""
        background = self.run / BACKGROUND_FILE
        return index_version(self.run), background.stat().st_mtime_ns if background.exists() else 0

    def open(self) -> OpenedIndex:
        """The engine and its background; ``UserError`` for an empty index or one of another model."""
        from clasp.serve.service import OpenedIndex

        store = open_run_store(self.run)
        if not store.count():
            raise UserError("nothing has been indexed yet; type: clasp index RUN FOLDER")
        engine = SearchEngine(self.model, store)
        # one of an earlier state will do while clasp index adds images: it measures the background when it is done
        saved = read_background(self.run / BACKGROUND_FILE, self.model.fingerprint)
        return OpenedIndex(engine, saved or open_background(self.run, engine))

    def writer(self, opened: UpdatableStore) -> AbstractContextManager[UpdatableStore]:
        """See ``IndexSource``."""
        return server_writer(self.run, opened)

    def refreshed(self, opened: OpenedIndex) -> OpenedIndex:
        """See ``IndexSource``."""
        return opened


class ChangingRunIndex(RunIndex):
    """The index of a run that is changed by HTTP: it may be empty, and opening it measures the background anew when the
    number of entries has changed much, which no ``clasp index`` does for it."""

    def open(self) -> OpenedIndex:
        """The engine and its background; ``UserError`` for an index of another model."""
        from clasp.serve.service import OpenedIndex

        engine = SearchEngine(self.model, open_store(self.run, recorded_store(self.run) or "flat"))
        return OpenedIndex(engine, open_background(self.run, engine))

    def refreshed(self, opened: OpenedIndex) -> OpenedIndex:
        """See ``IndexSource``."""
        return opened._replace(background=open_background(self.run, opened.engine))


def draw_answer(title: str, answer: SearchAnswer) -> bytes:
    """The contact sheet of an answer, as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        contact_sheet(contact_sheet_rows([(title, [ranked.hit for ranked in answer.hits])]), path)
        return path.read_bytes()
