"""The command ``clasp serve``: the page and the HTTP API over the index of a run.

Input: a run folder or an ONNX export, optionally images to index first, and an address. Output: a server until it is
stopped. Note: FastAPI and uvicorn are an extra, imported here inside functions; without them there is one line that
names the extra. An exported model is served without torch.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clasp.commands.background import open_background
from clasp.commands.run_store import index_version, open_run_store, recorded_store, server_writer
from clasp.commands.search import contact_sheet_rows, index_images
from clasp.commands.search_model import ModelLoader, find_search_model
from clasp.errors import counted
from clasp.plain_types import MessageCallback, ProgressFactory, SearchModel, UserError
from clasp.report.contact_sheet import contact_sheet
from clasp.search.answer import SearchAnswer
from clasp.search.background import BACKGROUND_FILE, read_background
from clasp.search.engine import SearchEngine, UpdatableStore
from clasp.search.flat_store import FlatStore
from clasp.search.store_registry import open_store, store_folder
from clasp.training.unfinished import unfinished_lines

if TYPE_CHECKING:
    import socket

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
    engine: str | None = None
    """Of ``ENGINES``; by default that of the model's folder, in the precision in which the index was made"""
    model: Path | None = None
    """The ONNX export to embed queries with; by default the folder that has the index"""
    workers: int = 1
    """Processes that answer, each with the model in memory"""
    allow_code: bool = False
    """Whether these processes may import the Python code that the run names"""


def require_serve_extra() -> None:
    """``UserError`` if the packages of the extra are not installed."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UserError(f"clasp serve needs {', '.join(missing)}; type: pip install 'clasp-vl[serve]'")


def serve_run(
    run: Path, pictures: str | None, settings: ServeSettings, *, say: MessageCallback, bar: ProgressFactory
) -> None:
    """Index ``pictures`` if given, load the model once a process, and answer until stopped. ``UserError`` before that.

    ``run``: the folder that has the index, of a run or an ONNX export.
    """
    require_serve_extra()
    from clasp.serve.server import bind_address, recorded_server, run_server, run_workers
    from clasp.serve.upload_folder import UploadFolder
    from clasp.serve.warm_server import new_key

    load = find_search_model(settings.model or run, settings.engine)
    if not run.is_dir():
        raise UserError(f"{run}: no such folder")
    if pictures is None and settings.uploads is None and recorded_store(run) is None:
        raise UserError(f"{run} has no index yet; name the images: clasp serve {run} --pictures FOLDER")
    if settings.workers > 1:
        _require_for_workers(run, settings)
    if settings.uploads is not None:
        UploadFolder(settings.uploads)  # one that cannot be made is told before the model is loaded
    address, key = bind_address(settings.host, settings.port, settings.token), new_key()
    for line in unfinished_lines(run) if pictures is None else ():  # indexing says it
        say(line)
    with closing(address.socket):
        model = None
        if pictures is not None:
            model = _model_for_index(run, load, settings)
            say(str(index_images(run, pictures, bar=bar, model=model)))
        if settings.workers > 1:
            del model  # each process has its own
            say(f"{settings.workers} processes; open {address.url} in a browser; Ctrl-C stops")
            with recorded_server(run, address, key, say):
                run_workers(settings.workers, address, _work, (run, settings, key))
            return
        with _served_app(run, model or _model_for_index(run, load, settings), settings, key) as (app, count):
            say(f"{counted(count, 'image')}; open {address.url} in a browser; Ctrl-C stops")
            with recorded_server(run, address, key, say):
                run_server(app, address.socket)


def _work(bound: socket.socket, run: Path, settings: ServeSettings, key: str) -> None:
    """What each of several processes does; an error is one line, and ends it."""
    from clasp.serve.server import follow_first_process, run_server
    from clasp.training.run_code import allow_code

    follow_first_process()
    try:
        with allow_code(None if settings.allow_code else ()):
            model = _model_for_index(run, find_search_model(settings.model or run, settings.engine), settings)
        with _served_app(run, model, settings, key) as (app, _):
            run_server(app, bound)
    except UserError as error:
        sys.exit(str(error))


@contextmanager
def _served_app(run: Path, model: SearchModel, settings: ServeSettings, key: str) -> Iterator[tuple[Any, int]]:
    """The application over the index, and the number of entries; both towers have run once."""
    from clasp.serve.app import AppSettings, CommandAccess, build_app
    from clasp.serve.editor import IndexEditor
    from clasp.serve.guard import AccessPolicy
    from clasp.serve.limits import ServeLimits
    from clasp.serve.metrics import ServerMetrics
    from clasp.serve.service import SearchService
    from clasp.serve.upload_folder import UploadFolder

    uploads = None if settings.uploads is None else UploadFolder(settings.uploads)
    index = RunIndex(run, model) if uploads is None else ChangingRunIndex(run, model)
    service = SearchService(index, run / "thumbnails", ServeLimits(), ServerMetrics())
    try:
        side = service.model.transform.size
        service.model.encode_pixels(np.zeros((1, 3, side, side), np.float32))
        service.model.encode_text(["a"])  # the first request then takes no longer than others
        policy = AccessPolicy(settings.host, settings.token, settings.hosts)
        editor = None if uploads is None else IndexEditor(service, uploads)
        command = CommandAccess(key, draw_answer)
        yield build_app(service, AppSettings(run.resolve().name, policy, command, editor)), service.count()
    finally:
        service.close()


def _model_for_index(run: Path, load: ModelLoader, settings: ServeSettings) -> SearchModel:
    """The model in the precision of the index. ``UserError`` where an engine that computes in another, or an export of
    another model, was asked for: indexing would then drop what is stored."""
    name = recorded_store(run)
    if name is None:
        return load()
    store = open_store(run, name)
    try:
        stored = store.model if store.count() else ""
    finally:
        store.close()
    model = load()
    same = model.in_precision_of(stored)
    if settings.engine not in (None, "torch") and same.fingerprint != model.fingerprint:
        raise UserError(
            f"the index of {run} was made with {same.name}, and --engine {settings.engine} is another; leave --engine "
            f"out, or delete {store_folder(run, name)}, and this command with --pictures FOLDER indexes again"
        )
    if settings.model is not None and stored not in ("", same.fingerprint):
        raise UserError(
            f"the index of {run} was made with another model than {settings.model}, or in bfloat16; an index of its "
            f"own: clasp serve {settings.model} --pictures FOLDER"
        )
    return same


def _require_for_workers(run: Path, settings: ServeSettings) -> None:
    """``UserError`` for what several processes cannot do together."""
    if settings.uploads is not None:
        raise UserError(f"--workers {settings.workers} and --uploads: one process changes the index; leave one out")
    if recorded_store(run) == "edge":
        raise UserError(
            f"--workers {settings.workers}: the index of {run} is in the store edge, which one process at a time has "
            f"open; use one worker, or move it: clasp store copy {run} --to flat"
        )


class RunIndex:
    """The index of a run, for a model that is already loaded."""

    def __init__(self, run: Path, model: SearchModel) -> None:
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

    def refreshed(self, opened: OpenedIndex, store: UpdatableStore) -> OpenedIndex:
        """See ``IndexSource``."""
        if store is opened.engine.store:
            return opened
        if isinstance(store, FlatStore):
            return opened._replace(engine=opened.engine.over(store))
        return self.open()  # it is closed


class ChangingRunIndex(RunIndex):
    """The index of a run that is changed by HTTP: it may be empty, and opening it measures the background anew when the
    number of entries has changed much, which no ``clasp index`` does for it."""

    def open(self) -> OpenedIndex:
        """The engine and its background; ``UserError`` for an index of another model."""
        from clasp.serve.service import OpenedIndex

        engine = SearchEngine(self.model, open_store(self.run, recorded_store(self.run) or "flat"))
        return OpenedIndex(engine, open_background(self.run, engine))

    def refreshed(self, opened: OpenedIndex, store: UpdatableStore) -> OpenedIndex:
        """See ``IndexSource``."""
        changed = super().refreshed(opened, store)
        return changed._replace(background=open_background(self.run, changed.engine))


def draw_answer(title: str, answer: SearchAnswer) -> bytes:
    """The contact sheet of an answer, as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        contact_sheet(contact_sheet_rows([(title, [ranked.hit for ranked in answer.hits])]), path)
        return path.read_bytes()
