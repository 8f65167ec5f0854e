"""``clasp search`` by a server that runs for the folder, before the verbs are imported: that would take longer.

Input: the words of the command. Output: whether a server answered, and all was printed. Note: only a search by words is
taken, with the options of the table below, each in its plain form; images, mistakes and all other forms are left to the
verb, which takes the same arguments. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clasp.commands.warm_search import FoundHits, search_warm_server


class PlainSearch(NamedTuple):
    """The arguments of the verb that a search by words may have; names and defaults are those of the verb."""

    run: Path
    words: str
    k: int = 10
    where: tuple[str, ...] = ()
    sheet: Path | None = None
    only_close: bool = False
    as_json: bool = False


_FLAGS = {"--only-close": "only_close", "--json": "as_json"}
_VALUES = {"-k": "k", "--where": "where", "--sheet": "sheet"}


def parse_plain_search(typed: Sequence[str]) -> PlainSearch | None:
    """The search in the words of a command; ``None`` for anything else."""
    if typed[:1] != ["search"]:
        return None
    places: list[str] = []
    given: dict[str, Any] = {"where": ()}
    rest = iter(typed[1:])
    for word in rest:
        if word in _FLAGS:
            given[_FLAGS[word]] = True
        elif word in _VALUES:
            value, name = next(rest, ""), _VALUES[word]
            if not value or value.startswith("-") or (name == "k" and not (value.isascii() and value.isdecimal())):
                return None
            given[name] = (*given["where"], value) if name == "where" else int(value) if name == "k" else Path(value)
        elif word.startswith("-"):
            return None
        else:
            places.append(word)
    if len(places) != 2 or given.get("k") == 0:
        return None
    return PlainSearch(Path(places[0]), places[1], **given)


def search_by_server(typed: Sequence[str]) -> bool:
    """Answer a plain search where a server runs for its folder. Raises ``UserError`` for a mistake in the search."""
    asked = parse_plain_search(typed)
    if asked is None:
        return False
    found = search_warm_server(asked.run, asked.words, (), asked.k, asked.where, asked.sheet, asked.only_close)
    if found is None:
        return False
    print_found(asked.run, found, as_json=asked.as_json)
    return True


def print_found(run: Path, found: FoundHits, *, as_json: bool) -> None:
    """The hits as a table, or as one JSON object."""
    from clasp.report.console import print_json, print_status, print_table, relative_path
    from clasp.training.unfinished import unfinished_lines

    if as_json:
        return print_json({"query": found.query, **found.answer, "sheet": str(found.sheet)})
    for line in unfinished_lines(run):
        print_status(line)
    print_table(found.query, ("id", "cosine", "z", "image"), [_hit_cells(hit) for hit in found.answer["hits"]])
    if found.answer["note"]:
        print_status(found.answer["note"])
    print_status(f"picture of the hits: {relative_path(found.sheet)}")


def _hit_cells(hit: dict[str, Any]) -> list[str]:
    from clasp.report.console import relative_path

    copies = f" (+{len(hit['duplicates'])} nearly the same)" if hit["duplicates"] else ""
    z = "" if hit["z"] is None else f"{hit['z']:.1f}"
    return [hit["id"], f"{hit['score']:.3f}", z, relative_path(hit["meta"]["name"]) + copies]
