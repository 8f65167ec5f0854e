"""``clasp search`` through a server that already runs for the run folder, where the model is in memory.

Input: a search as typed. Output: ``FoundHits``, or ``None`` where no server of this run answers. Note: what the server
refuses for its limits is left to the caller, which has none; a mistake in the search is the same ``UserError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clasp.errors import UserError
from clasp.serve.warm_server import ask_warm_server


class FoundHits(NamedTuple):
    """The query, the answer as of ``SearchAnswer.to_dict``, and the path of the contact sheet."""

    query: str
    answer: dict[str, Any]
    sheet: Path


def search_warm_server(
    run: Path,
    words: str | None,
    images: Sequence[tuple[Path, float]],
    k: int,
    where: Sequence[str] = (),
    sheet: Path | None = None,
    only_close: bool = False,
) -> FoundHits | None:
    """As ``search_images``, answered by the server of the run; ``None`` if there is none or there is no query."""
    try:
        read = [(path.read_bytes(), weight) for path, weight in images]
    except OSError:
        return None
    if not all(data for data, _ in read) or not (words or read):
        return None
    found = ask_warm_server(run, words, read, k, where, only_close)
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
    return FoundHits(search_title(words, images), found.answer, path)


def search_title(words: str | None, images: Sequence[tuple[Path, float]]) -> str:
    """The search in one line."""
    pictures = [f"picture {path}" + ("" if weight == 1.0 else f" with weight {weight:g}") for path, weight in images]
    return " + ".join([*([words] if words else []), *pictures])
