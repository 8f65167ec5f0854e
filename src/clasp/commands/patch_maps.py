"""``clasp analyze RUN --maps``: pictures of where in an image a caption and its words are found.

Input: run and options as typed. Output: ``RUN/maps.png`` and the maps of every pair. Note: pairs are chosen by a hash
of the ids unless they are named; nothing of the run is changed or measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clasp.analysis.patch_maps import PatchMaps, compute_patch_maps
from clasp.config.build import load
from clasp.config.datasets import open_pairs_for_recipe
from clasp.config.recipe import recipe_from_dict
from clasp.data.images import ImageError
from clasp.data.pairs import ColumnNames, Pairs, caption_languages
from clasp.evaluation.language_sets import require_languages
from clasp.evaluation.registry import MAP_OPTIONS, MAX_MAPPED_PAIRS, parse_options
from clasp.evaluation.retention.features import hashed_subset
from clasp.report.patch_map_sheet import draw_patch_maps
from clasp.training.run_folder import RunFolder
from clasp.types import Pair, ProgressFactory, UserError, no_progress_bar

MAPS_FILE = "maps.png"
_MAX_WORDS, _LEAST_LETTERS = 6, 3
_PUNCTUATION = ".,;:!?\"'()[]…–—„“”«»"


def map_patches(
    run: str | Path, options: Sequence[str] = (), *, bar: ProgressFactory = no_progress_bar
) -> dict[str, PatchMaps]:
    """Maps of some pairs, by id, drawn in the run folder; ``options`` are ``key=value`` of ``MAP_OPTIONS``.

    Raises ``UserError``, also where the image tower has no patches.
    """
    folder = RunFolder(run)
    given = parse_options("analyze --maps", MAP_OPTIONS, options)
    recipe = recipe_from_dict(folder.recipe(), str(run))
    columns = ColumnNames(image=given.get("image", ""), caption=given.get("caption", ""))
    pairs = open_pairs_for_recipe(given["data"], recipe, columns=columns, image_root=given.get("image_root"))
    language = given.get("language", "")
    if language:
        require_languages([language], caption_languages(pairs), given["data"])
    chosen = _chosen_pairs(pairs, given)
    texts = {pair.id: _texts(pair, language, given.get("words")) for pair in chosen}
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


def _chosen_pairs(pairs: Pairs, given: Mapping[str, str]) -> list[Pair]:
    """The pairs that are named, in that order, or ``pairs=`` of them."""
    rows = {pair.id: row for row, pair in enumerate(pairs)}
    if "ids" in given:
        ids = given["ids"].split(",")
        if unknown := [id for id in ids if id not in rows]:
            some = ", ".join(list(rows)[:3])
            raise UserError(f"analyze --maps: no pair of {given['data']} has the id {unknown[0]!r}; ids: {some}, …")
    else:
        text = given["pairs"]
        if not (text.isdecimal() and 1 <= int(text) <= MAX_MAPPED_PAIRS):
            raise UserError(f"analyze --maps: pairs={text} must be a whole number from 1 to {MAX_MAPPED_PAIRS}")
        ids = sorted(hashed_subset(rows, int(text)))
    return [pairs[rows[id]] for id in ids]


def _texts(pair: Pair, language: str, words: str | None) -> list[str]:
    """The caption, and the words that are given or the longest of its own, in their order."""
    caption = next((each.text for each in pair.captions if language in ("", each.language)), None)
    if caption is None:
        raise UserError(f"analyze --maps: {pair.id} has no caption" + (f" in {language}" if language else ""))
    if words is not None:
        return [caption, *words.split(",")]
    own = list(dict.fromkeys(word.strip(_PUNCTUATION) for word in caption.split()))
    longest = sorted((word for word in own if len(word) >= _LEAST_LETTERS), key=len, reverse=True)[:_MAX_WORDS]
    return [caption, *(word for word in own if word in longest and word != caption)]
