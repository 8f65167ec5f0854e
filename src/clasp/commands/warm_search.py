"""``clasp search`` through a server that already runs for the run folder, where the model is in memory.

Input: a search as typed. Output: ``FoundHits``, or ``None`` where no server of this run answers. Note: what the server
refuses for its limits is left to the caller, which has none; a mistake in the search is the same ``UserError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clasp.errors import UserError
from clasp.serve.warm_server import ask_warm_server


@dataclass(frozen=True, slots=True)
class FoundHits:
    """The query, the answer as of ``SearchAnswer.to_dict``, and the path of the contact sheet."""

    query: str
    answer: dict[str, Any]
    sheet: Path


def search_warm_server(
    run: Path,
    words: str | None,
    image: Path | None,
    k: int,
    where: Sequence[str] = (),
    sheet: Path | None = None,
    image_weight: float = 1.0,
) -> FoundHits | None:
    """As ``search_images``, answered by the server of the run; ``None`` if there is none or there is no query."""
    try:
        data = image.read_bytes() if image else None
    except OSError:
        return None
    if (image and not data) or not (words or data):
        return None
    found = ask_warm_server(run, words, data, k, where, image_weight)
    if found is None:
        return None
    if found.error:
        raise UserError(found.error)
    path = sheet or run / "search.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found.sheet)
    except OSError as error:
        raise UserError(f"the picture of the hits, {path}, cannot be written: {error.strerror or error}") from None
    return FoundHits(search_title(words, image, image_weight), found.answer, path)


def search_title(words: str | None, image: Path | None, image_weight: float = 1.0) -> str:
    """The search in one line."""
    weight = "" if image_weight == 1.0 else f" with weight {image_weight:g}"
    return " + ".join(part for part in (words, f"picture {image}{weight}" if image else None) if part)
