"""The HTTP API: routes, error answers and the files of the page, around a ``SearchService``.

Input: a service and who may use it. Output: an ASGI application with an OpenAPI description at ``/openapi.json``. Note:
handlers are plain functions, which FastAPI runs in threads; the model itself runs in one thread (``model_queue``).
Every error is one line of JSON; what a request has wrong is a 4xx, a damaged index a 500. Long, since most
routes and all error answers are here.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from clasp.data.formats.rows import shorten
from clasp.plain_types import UserError
from clasp.search.answer import SearchAnswer
from clasp.search.manifest import DamagedStoreError
from clasp.search.query import SearchQuery
from clasp.serve.change_routes import NO_ENTRY, add_change_routes
from clasp.serve.editor import IndexEditor, IndexUnchangedError
from clasp.serve.guard import AccessPolicy, RequestGuard
from clasp.serve.metrics import METRICS_MEDIA_TYPE
from clasp.serve.model_queue import ModelTimeoutError, QueueFullError
from clasp.serve.parameters import (
    ClassifyForm,
    CommandSearchParameters,
    EmbedForm,
    EmbedTexts,
    EntryId,
    ExplainParameters,
    RankingParameters,
    SearchForm,
    SearchParameters,
    SimilarParameters,
    form_data,
)
from clasp.serve.public_text import readable, stored_id
from clasp.serve.requests import (
    entry_model,
    explain_response,
    explained_query,
    part_of,
    query_of,
    query_title,
    search_response,
    split_images,
    weighted_images,
)
from clasp.serve.schemas import (
    BrowseResponse,
    ClassifyResponse,
    ClassScore,
    EmbedResponse,
    ErrorResponse,
    ExplainResponse,
    FieldModel,
    InfoResponse,
    SearchResponse,
)
from clasp.serve.service import NoSuchEntryError, SearchService
from clasp.serve.warm_server import COMMAND_PATH, PROOF_FIELD, answer_proof, request_proof

_log = logging.getLogger(__name__)

_PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_Version = Annotated[str, Query(max_length=64, description="Start of the hash of its bytes; lets browsers cache.")]
_ERRORS = (400, 401, 403, 408, 413, 421, 422, 429, 500, 503)
_IMAGE_POLICY = "default-src 'none'; sandbox"


@dataclass(frozen=True, slots=True)
class CommandAccess:
    """How ``clasp search`` of the same machine is answered: the key it must know, and the function that draws."""

    key: str
    draw: Callable[[str, SearchAnswer], bytes]
    """Title and answer to the contact sheet, a PNG."""


@dataclass(frozen=True, slots=True)
class AppSettings:
    """What an application is made of, beside its service."""

    run: str
    """The name shown on the page."""
    policy: AccessPolicy = field(default_factory=AccessPolicy)
    command: CommandAccess | None = None
    editor: IndexEditor | None = None
    """Of a server whose index requests may change"""


def build_app(service: SearchService, settings: AppSettings) -> ASGIApp:
    """The application, behind its guard."""
    app = FastAPI(
        title="clasp",
        description=f"Search over the index of the run {settings.run}.",
        docs_url=None,  # the usual page loads its scripts from elsewhere
        redoc_url=None,
        responses={code: {"model": ErrorResponse} for code in _ERRORS},
    )
    _add_error_answers(app)
    _add_search_routes(app, service)
    _add_model_routes(app, service)
    _add_image_routes(app, service)
    add_change_routes(app, settings.editor)
    _add_status_routes(app, service, settings)
    _add_page(app)
    if settings.command is not None:
        _add_command_route(app, service, settings.command)
    paths = frozenset(app.openapi()["paths"]) | {COMMAND_PATH, *_PAGE_FILES}
    metrics = service.metrics

    def count(path: str, status: int, seconds: float) -> None:
        metrics.count_request(path if path in paths else "other", status, seconds)

    return RequestGuard(app, settings.policy, service.limits, count)


# --- routes ----------------------------------------------------------------------------------------------------------


def _add_search_routes(app: FastAPI, service: SearchService) -> None:
    limits = service.limits

    def answered(query: SearchQuery, given: RankingParameters, only_close: bool = False) -> SearchResponse:
        answer = service.search(query, part_of(given, limits, only_close))
        return search_response(query_title(query), given.offset, answer)

    @app.get("/api/search", tags=["search"])
    def search(given: Annotated[SearchParameters, Query()]) -> SearchResponse:
        """Search by words, minus terms and feedback."""
        return answered(query_of(given, (), limits), given, given.only_close)

    @app.post("/api/search", tags=["search"], openapi_extra=form_data("SearchForm"))
    def search_with_images(given: Annotated[SearchForm, Form()]) -> SearchResponse:
        """Search by uploaded images, words, minus terms and feedback."""
        images = weighted_images(given, [image.file.read() for image in given.image])
        return answered(query_of(given, images, limits), given, given.only_close)

    @app.get("/api/similar", tags=["search"])
    def similar(given: Annotated[SimilarParameters, Query()]) -> SearchResponse:
        """More like one entry."""
        return answered(SearchQuery(like=(stored_id(given.id),)), given)

    @app.get("/api/explain", tags=["search"], responses=NO_ENTRY)
    def explain(given: Annotated[ExplainParameters, Query()]) -> ExplainResponse:
        """Why an entry is a hit: what each part of the query scores with it, and the nearest background captions."""
        return explain_response(service.explain(stored_id(given.id), explained_query(given, limits), given.k))

    @app.get("/api/browse", tags=["search"])
    def browse(given: Annotated[RankingParameters, Query()]) -> BrowseResponse:
        """The collection without a query, in the order in which it was indexed."""
        part = part_of(given, limits)
        entries, total = service.browse(part)
        more = part.offset + len(entries) < total
        return BrowseResponse(entries=[entry_model(hit) for hit in entries], offset=part.offset, total=total, more=more)


def _add_model_routes(app: FastAPI, service: SearchService) -> None:
    @app.post("/api/classify", tags=["model"], openapi_extra=form_data("ClassifyForm"))
    def classify(given: Annotated[ClassifyForm, Form()]) -> ClassifyResponse:
        """Zero-shot classification of an image over class names."""
        scores = service.classify(given.image.file.read(), given.names, given.template)
        return ClassifyResponse(classes=[ClassScore(name=name, score=score) for name, score in scores])

    @app.post("/api/embed/text", tags=["model"])
    def embed_text(given: EmbedTexts) -> EmbedResponse:
        """Unit vectors of texts."""
        vectors = service.embed_texts(given.texts).tolist()
        return EmbedResponse(model=service.model.fingerprint, embeddings=vectors)

    @app.post("/api/embed/image", tags=["model"], openapi_extra=form_data("EmbedForm"))
    def embed_image(given: Annotated[EmbedForm, Form()]) -> EmbedResponse:
        """The unit vector of an image."""
        vectors = service.embed_image(given.image.file.read()).tolist()
        return EmbedResponse(model=service.model.fingerprint, embeddings=vectors)


def _add_image_routes(app: FastAPI, service: SearchService) -> None:
    @app.get("/api/thumbnail", tags=["images"], response_class=Response, responses=NO_ENTRY)
    def thumbnail(id: EntryId, v: _Version = "") -> Response:
        """A small WebP image of an entry."""
        made = service.thumbnail(stored_id(id))
        return Response(made.data, media_type=made.media_type, headers=_image_headers(v))

    @app.get("/api/image", tags=["images"], response_class=Response, responses=NO_ENTRY)
    def image(id: EntryId, v: _Version = "") -> Response:
        """The original image of an entry, byte for byte."""
        found = service.original(stored_id(id))
        return Response(found.data, media_type=found.media_type, headers=_image_headers(v))


def _add_status_routes(app: FastAPI, service: SearchService, settings: AppSettings) -> None:
    @app.get("/api/info", tags=["status"])
    def info() -> InfoResponse:
        """The collection, the model and the limits."""
        fields = [
            FieldModel(name=readable(name), values={readable(value): count for value, count in values.items()})
            for name, values in service.fields().items()
        ]
        return InfoResponse(
            run=readable(settings.run),
            model=service.model.name,
            entries=service.count(),
            fields=fields,
            limits=asdict(service.limits),
            changes=settings.editor is not None,
        )

    @app.get("/health", tags=["status"])
    def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["status"])
    def ready() -> dict[str, int]:
        """Whether searches are answered: model and index are loaded before the server listens."""
        return {"entries": service.count()}

    @app.get("/metrics", tags=["status"], response_class=Response)
    def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.render(), media_type=METRICS_MEDIA_TYPE)


def _add_command_route(app: FastAPI, service: SearchService, access: CommandAccess) -> None:
    @app.post(COMMAND_PATH, include_in_schema=False)
    def command(
        given: Annotated[CommandSearchParameters, Query()],
        body: Annotated[bytes, Depends(_body)],
        request: Request,
        x_clasp_nonce: Annotated[str, Header()] = "",
        x_clasp_proof: Annotated[str, Header()] = "",
    ) -> Response:
        wanted = request_proof(access.key, x_clasp_nonce, request.scope["query_string"], body)
        if not hmac.compare_digest(x_clasp_proof.encode("utf-8", "replace"), wanted.encode()):
            raise HTTPException(403, "this is not the server of that run")

        def proved(status: int, content: bytes) -> Response:
            proof = {PROOF_FIELD: answer_proof(access.key, x_clasp_nonce, content)}
            return Response(content, status, proof, media_type="application/octet-stream")

        try:
            query = query_of(given, weighted_images(given, split_images(given, body)), service.limits)
            answer = service.search(query, part_of(given, service.limits, given.only_close))
        except UserError as error:
            if type(error) is not UserError:  # of the server, not of the search
                raise
            return proved(400, json.dumps({"error": str(error)}).encode())
        sheet = access.draw(given.q, answer)
        head = json.dumps(answer.to_dict()).encode()  # escapes what is no valid Unicode
        return proved(200, len(head).to_bytes(8) + head + sheet)


async def _body(request: Request) -> bytes:
    return await request.body()


def _add_page(app: FastAPI) -> None:
    folder = files("clasp.serve") / "page"
    for path, (name, media_type) in _PAGE_FILES.items():
        content = (folder / name).read_bytes()

        def page(content: bytes = content, media_type: str = media_type) -> Response:
            return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

        app.add_api_route(path, page, include_in_schema=False)


def _image_headers(version: str) -> dict[str, str]:
    kept = "private, max-age=31536000, immutable" if version else "no-cache"
    return {"cache-control": kept, "content-security-policy": _IMAGE_POLICY}


# --- errors ----------------------------------------------------------------------------------------------------------


def _add_error_answers(app: FastAPI) -> None:
    def answer(status: int, line: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": readable(line)}, status, headers)

    @app.exception_handler(NoSuchEntryError)
    def no_entry(request: Request, error: Exception) -> JSONResponse:
        return answer(404, str(error))

    @app.exception_handler(IndexUnchangedError)
    def unchanged(request: Request, error: Exception) -> JSONResponse:
        return answer(503, str(error), {"retry-after": "5"})

    @app.exception_handler(DamagedStoreError)
    def damaged(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s", error)
        return answer(500, str(error))

    @app.exception_handler(UserError)
    def user_error(request: Request, error: Exception) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(422, _first_problem(error.errors()))

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return answer(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(QueueFullError)
    def full(request: Request, error: Exception) -> JSONResponse:
        return answer(429, "too many requests wait for the model; try again", {"retry-after": "1"})

    @app.exception_handler(ModelTimeoutError)
    def slow(request: Request, error: Exception) -> JSONResponse:
        return answer(503, "the model did not answer in time; try again", {"retry-after": "5"})

    @app.exception_handler(Exception)
    def ours(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "an error of the server's; its log has more")


def _first_problem(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors as one line; an unknown key may hold anything, line breaks too."""
    first = errors[0]
    plain = (str(part) if str(part).isidentifier() and len(part) <= 80 else shorten(part) for part in first["loc"][1:])
    where = ".".join(plain)
    line = " ".join(str(first["msg"]).split())
    return f"{where or 'the request'}: {line}; see /openapi.json"
