"""Routes that change the index: ``POST /api/images`` adds images, ``DELETE /api/image`` deletes an entry.

Input: an application and an ``IndexEditor``, ``None`` for a server that changes nothing. Output: nothing. Note: the
routes exist in both cases, so that the description of the API is the same; without an editor they answer 403.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Form
from starlette.exceptions import HTTPException

from clasp.serve.editor import ClientFile, IndexEditor
from clasp.serve.parameters import AddForm, EntryId, form_data
from clasp.serve.public_text import stored_id
from clasp.serve.requests import entry_model
from clasp.serve.schemas import AddedResponse, DeletedResponse, ErrorResponse

_Responses = dict[int | str, dict[str, Any]]
_REFUSED: _Responses = {
    403: {"model": ErrorResponse, "description": "The server was started without --uploads FOLDER."}
}
NO_ENTRY: _Responses = {404: {"model": ErrorResponse, "description": "There is no entry of this id."}}


def add_change_routes(app: FastAPI, editor: IndexEditor | None) -> None:
    """Add the routes."""

    def allowed() -> IndexEditor:
        if editor is None:
            raise HTTPException(403, "this server does not change its index; clasp serve RUN --uploads FOLDER does")
        return editor

    @app.post(
        "/api/images",
        status_code=201,
        tags=["changes"],
        openapi_extra=form_data("AddForm"),
        responses=_REFUSED,
    )
    def add(given: Annotated[AddForm, Form()]) -> AddedResponse:
        """Add images: all or none. The answer comes when they are stored durably; the next search finds them."""
        changed = allowed()
        files = [ClientFile(image.file.read(), image.filename or "") for image in given.images]
        return AddedResponse(entries=[entry_model(hit) for hit in changed.add(files)])

    @app.delete("/api/image", tags=["changes"], responses={**_REFUSED, **NO_ENTRY})
    def delete(id: EntryId) -> DeletedResponse:
        """Delete an entry; its file only if it was added by HTTP.

        The image of another folder is found again by the next clasp index of that folder.
        """
        return DeletedResponse(id=id, file_deleted=allowed().delete(stored_id(id)))
