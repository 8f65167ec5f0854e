"""``clasp maps``: pictures of where in an image a caption and its words are found.

Input: run and options as typed. Output: ``RUN/maps.png`` and the maps of every pair. Note: pairs are chosen by a hash
of the ids unless they are named; nothing of the run is changed or measured.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from clasp.analysis.patch_maps import PatchMaps, compute_patch_maps
from clasp.config.build import load
from clasp.config.datasets import open_pairs_for_recipe
from clasp.config.recipe import recipe_from_dict
from clasp.data.formats.setting_hints import OPTION_HINTS
from clasp.data.images import ImageError
from clasp.data.missing_images import require_images
from clasp.data.pairs import ColumnNames, Pairs, caption_languages
from clasp.evaluation.language_sets import require_languages
from clasp.evaluation.options import (
    DEFAULT_MAPPED_PAIRS,
    MAP_OPTIONS,
    MAX_MAPPED_PAIRS,
    MAX_MAPPED_WORDS,
    parse_options,
)
from clasp.evaluation.retention.features import hashed_subset
from clasp.report.patch_map_sheet import draw_patch_maps
from clasp.training.run_folder import RunFolder
from clasp.types import Pair, ProgressFactory, UserError, no_progress_bar

MAPS_FILE = "maps.png"
_MAX_OWN_WORDS, _LEAST_LETTERS = 6, 3
_PUNCTUATION = ".,;:!?\"'()[]…–—„“”«»"


def map_patches(
    run: str | Path, options: Sequence[str] = (), *, bar: ProgressFactory = no_progress_bar
) -> dict[str, PatchMaps]:
    """Maps of some pairs, by id, drawn in the run folder; ``options`` are ``key=value`` of ``MAP_OPTIONS``.

    Raises ``UserError``, also where the image tower has no patches.
    """
    folder = RunFolder(run)
    given = parse_options("maps", MAP_OPTIONS, options)
    ids, words = _listed(given, "ids", MAX_MAPPED_PAIRS), _listed(given, "words", MAX_MAPPED_WORDS)
    count, language = _count(given), given.get("language", "")
    recipe = recipe_from_dict(folder.recipe(), str(run))
    columns = ColumnNames(image=given.get("image", ""), caption=given.get("caption", ""))
    root = given.get("image_root")
    pairs = open_pairs_for_recipe(given["data"], recipe, columns=columns, image_root=root, hints=OPTION_HINTS)
    require_images(OPTION_HINTS, pairs)
    if language:
        require_languages([language], caption_languages(pairs), given["data"])
    chosen = _named_pairs(pairs, ids, given["data"]) if ids else _drawn_pairs(pairs, count, language)
    texts = {pair.id: _texts(pair, language, words) for pair in chosen}
    model, found = load(run), {}
    with bar(f"{model.name}: maps") as progress:
        for pair in chosen:
            try:
                found[pair.id] = compute_patch_maps(model, pair.image.read(), texts[pair.id])
            except ImageError as error:
                raise UserError(f"{pair.id} of {given['data']}: {error}") from None
            progress(len(found), len(chosen))
    draw_patch_maps(list(found.values()), f"{folder.path.name}: {given['data']}", folder.path / MAPS_FILE)
    return found


# --- how -------------------------------------------------------------------------------------------------------------


def _listed(given: Mapping[str, str], name: str, limit: int) -> list[str]:
    """The values of an option, each once; none where it is left out."""
    if name not in given:
        return []
    try:
        row = next(csv.reader([given[name]], skipinitialspace=True))
    except csv.Error as error:
        raise UserError(f"maps: {name}={given[name]!r} is not a list separated by commas: {error}") from None
    values = list(dict.fromkeys(value.strip() for value in row))
    if not all(values) or not 1 <= len(values) <= limit:
        raise UserError(
            f"maps: {name}={given[name]} has {len(values)} values; from 1 to {limit} are wanted, separated by commas "
            "and none empty"
        )
    return values


def _count(given: Mapping[str, str]) -> int:
    """How many pairs to draw where none are named."""
    if "ids" in given and "pairs" in given:
        raise UserError(f"maps: pairs={given['pairs']} and ids={given['ids']}: give one, ids= names all that are drawn")
    text = given.get("pairs", DEFAULT_MAPPED_PAIRS)
    if not (text.isdecimal() and 1 <= int(text) <= MAX_MAPPED_PAIRS):
        raise UserError(f"maps: pairs={text} must be a whole number from 1 to {MAX_MAPPED_PAIRS}")
    return int(text)


def _named_pairs(pairs: Pairs, ids: Sequence[str], data: str) -> list[Pair]:
    """In the order of ``ids``."""
    rows = {pair.id: row for row, pair in enumerate(pairs)}
    if unknown := [id for id in ids if id not in rows]:
        some = ", ".join(list(rows)[:3])
        raise UserError(f"maps: no pair of {data} has the id {unknown[0]!r}; ids: {some}, …")
    return [pairs[rows[id]] for id in ids]


def _drawn_pairs(pairs: Pairs, count: int, language: str) -> list[Pair]:
    """At most ``count`` of those with a caption in the language."""
    rows = {pair.id: row for row, pair in enumerate(pairs) if _caption(pair, language) is not None}
    return [pairs[rows[id]] for id in sorted(hashed_subset(rows, count))]


def _caption(pair: Pair, language: str) -> str | None:
    """The first caption, or the first in a language."""
    return next((each.text for each in pair.captions if language in ("", each.language)), None)


def _texts(pair: Pair, language: str, words: Sequence[str]) -> list[str]:
    """The caption, and the words that are given or the longest of its own that have letters, in their order."""
    caption = _caption(pair, language)
    if caption is None:
        raise UserError(f"maps: {pair.id} has no caption" + (f" in {language}" if language else ""))
    if words:
        return [caption, *words]
    own = list(dict.fromkeys(word.strip(_PUNCTUATION) for word in caption.split()))
    long = [word for word in own if len(word) >= _LEAST_LETTERS and any(letter.isalpha() for letter in word)]
    longest = sorted(long, key=len, reverse=True)[:_MAX_OWN_WORDS]
    return [caption, *(word for word in own if word in longest and word != caption)]
