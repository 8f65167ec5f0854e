"""``clasp pair``: image towers and text towers ranked in all combinations, before anything is trained.

Input: tower names, and overrides of the recipe ``auto`` with the pairs. Output: a ``TowerPair`` for each combination,
the best first. Measured are the validation metric of heads in closed form, as ``clasp train auto`` begins, and mutual
k-NN and CKA of the layers. Note: each tower runs once over the pairs, its features are cached and serve every
combination and later training; all towers are in memory together. Heads are compared in their layers alone, not in
ridge and width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from accelerate import PartialState
from jaxtyping import Float, Int
from torch import Tensor

from clasp.analysis.layer_similarity import LayerSimilarity, layer_similarity
from clasp.commands.closed_form import attention_of_runs, begin_search, choose_trial, search_recipe, with_layer_pools
from clasp.commands.repeated_lines import said_once
from clasp.config.build import (
    build_feature_source,
    build_image_tower,
    build_text_tower,
    join_frozen_towers,
)
from clasp.config.datasets import TrainValPairs, open_training_pairs
from clasp.config.recipe import Recipe, read_recipe
from clasp.data.distinct_captions import indistinct_captions, require_different_captions
from clasp.data.formats.setting_hints import RECIPE_HINTS, suggest_key
from clasp.data.images import ImageTransform
from clasp.data.loader import BadSampleLimit, BatchReader
from clasp.data.missing_images import require_images
from clasp.data.readers import PairIndex
from clasp.data.sample_size import few_validation_pairs
from clasp.data.tokenizer import Tokenizer
from clasp.errors import counted
from clasp.evaluation.from_pairs import validation_task, validation_texts
from clasp.evaluation.retention.features import hashed_subset
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.models.tower import Tower
from clasp.models.zoo.registry import load_backbone
from clasp.report.pair_table import TowerPair, cka_excess, neighbour_excess
from clasp.training.pooled_features import PairFeatures
from clasp.types import MessageCallback, ProgressFactory, UserError, no_progress_bar

_COMPARED_PAIRS, _NEIGHBOURS = 1000, 10  # of the similarity of layers: pairs, and K of the mutual k-nearest neighbours
_TOWER_KEYS = ("image.tower", "text.tower")
_T = TypeVar("_T")


def rank_tower_pairs(
    images: Sequence[str],
    texts: Sequence[str],
    overrides: Sequence[str],
    *,
    say: MessageCallback = lambda line: None,
    bar: ProgressFactory = no_progress_bar,
) -> list[TowerPair]:
    """Rank all combinations. Raises ``UserError`` before any compute, naming every tower that cannot be used."""
    _require_distinct_towers("--image", images)
    _require_distinct_towers("--text", texts)
    _require_no_pairs([*images, *texts], overrides)
    say = said_once(say)
    if given := [text for text in overrides if text.partition("=")[0].strip() in _TOWER_KEYS]:
        raise UserError(f"override {given[0]!r}: the towers of clasp pair are those of --image and --text")
    recipes = {(image, text): _read(image, text, overrides) for image in images for text in texts}
    of_images = {image: recipe for (image, _), recipe in recipes.items()}
    of_texts = {text: recipe for (_, text), recipe in recipes.items()}
    errors: list[str] = []
    _load_each(of_images, lambda recipe: load_backbone(recipe.image, meta=True), errors)
    _load_each(of_texts, lambda recipe: load_backbone(recipe.text, meta=True), errors)
    _raise_all(errors)
    recipes = {pair: search_recipe(with_layer_pools(recipe)) for pair, recipe in recipes.items()}
    of_images = {image: recipe for (image, _), recipe in recipes.items()}
    of_texts = {text: recipe for (_, text), recipe in recipes.items()}
    first = recipes[images[0], texts[0]]
    pairs = open_training_pairs(first)
    require_images(RECIPE_HINTS, *pairs, max_bad_fraction=first.data.max_bad_fraction)
    index = PairIndex(pairs[0])
    require_different_captions(index.texts, pairs[0].name)
    towers = _Towers(
        _load_each(of_images, build_image_tower, errors), _load_each(of_texts, build_text_tower, errors), {}
    )
    _raise_all(errors)
    say(
        f"{counted(len(pairs[0]), 'pair')} and {len(pairs[1]):,} to validate on; combinations: {len(recipes)}; "
        "features of each tower, and of class names where an image tower was trained as a classifier; then closed forms"
    )
    for line in few_validation_pairs(pairs[1].group_count):
        say(line)
    for name, (_, tokenizer) in towers.text.items():
        if reason := indistinct_captions(index.texts, tokenizer):
            errors.append(f"{name}: {reason}")
    _raise_all(errors)
    ranking = _Ranking(towers, pairs, index, tuple(overrides), say, bar)
    with attention_of_runs(recipes[images[0], texts[0]]):
        found = [ranking.measure(image, text, recipe) for (image, text), recipe in recipes.items()]
    return sorted(found, key=lambda pair: pair.metric, reverse=True)


def _require_distinct_towers(option: str, names: Sequence[str]) -> None:
    if not names:
        raise UserError(f"{option} names no tower; name one or several: {option} TOWER TOWER")
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise UserError(f"{option} names {twice[0]} twice")


def _require_no_pairs(towers: Sequence[str], overrides: Sequence[str]) -> None:
    """Raises ``UserError`` for a path after ``--image`` or ``--text``, where a word is a tower."""
    given = [text.partition("=")[0].strip() for text in overrides]
    for name in towers:
        if hint := suggest_key(name, ("data.train", "data.val"), given):
            raise UserError(f"{name!r} is not a tower{hint} A tower in a folder is file:{name}")


def _read(image: str, text: str, overrides: Sequence[str]) -> Recipe:
    return read_recipe("auto", [f"image.tower={image}", f"text.tower={text}", *overrides])


def _load_each(recipes: Mapping[str, Recipe], load: Callable[[Recipe], _T], errors: list[str]) -> dict[str, _T]:
    """What ``load`` makes of each recipe; the message of a ``UserError`` goes to ``errors``."""
    loaded: dict[str, _T] = {}
    for name, recipe in recipes.items():
        try:
            loaded[name] = load(recipe)
        except UserError as error:
            errors.append(str(error))
    return loaded


def _raise_all(errors: Sequence[str]) -> None:
    if errors:
        raise UserError("; ".join(errors))


# --- the ranking -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Towers:
    """Every tower by name, with its transform or tokenizer; and by side and name the seconds of its features, once they
    are there."""

    image: dict[str, tuple[Tower, ImageTransform]]
    text: dict[str, tuple[Tower, Tokenizer]]
    seconds: dict[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class _Ranking:
    """What all combinations have in common. ``index``: of the training pairs."""

    towers: _Towers
    pairs: TrainValPairs
    index: PairIndex
    overrides: tuple[str, ...]
    say: MessageCallback
    bar: ProgressFactory

    def measure(self, image: str, text: str, recipe: Recipe) -> TowerPair:
        """One combination, from the features of its towers, which are computed with the first that has them."""
        parts = join_frozen_towers(self.towers.image[image], self.towers.text[text], recipe)
        parts.model.to(PartialState().device).eval()
        inputs = build_feature_source(parts, recipe, bar=self.bar, say=self.say)
        self._compute_features(image, text, inputs)
        began = time.perf_counter()
        sides = inputs.batch_reader(self.pairs[0], self.index, None)
        task = validation_task(*self.pairs, inputs)
        search = begin_search(parts.model, recipe, sides, task, inputs)
        with self.bar(f"{image} and {text}: heads in closed form") as progress:
            trial, _ = choose_trial(search.run_layers(progress))
        layers = self._similarity(parts.model, sides, recipe)
        found = TowerPair(
            image=image,
            text=text,
            primary=task.primary,
            metric=trial.score.value,
            interval=(trial.score.interval[0], trial.score.interval[1]),
            validated=self.pairs[1].group_count,
            layers=str(trial.candidate),
            trained=trial.delta_bytes // 4,
            nearest=max(layers, key=neighbour_excess, default=None),
            most_aligned=max(layers, key=cka_excess, default=None),
            feature_seconds=self.towers.seconds["image", image] + self.towers.seconds["text", text],
            seconds=time.perf_counter() - began,
            overrides=self.overrides,
        )
        self.say(f"{image} and {text}: {found.primary} {found.metric:.4g}")
        return found

    def _compute_features(self, image: str, text: str, inputs: FeatureSource) -> None:
        """Fill the feature cache with what this combination needs and no earlier one did."""
        train, val = self.pairs
        if ("image", image) not in self.towers.seconds:
            began = time.perf_counter()
            for some in (train, val):
                inputs.image_features(some)
            self.towers.seconds["image", image] = time.perf_counter() - began
        if ("text", text) not in self.towers.seconds:
            began = time.perf_counter()
            for texts in (self.index.texts, *validation_texts(train, val)):
                inputs.text_features(texts)
            self.towers.seconds["text", text] = time.perf_counter() - began

    def _similarity(self, model: DualEncoder, sides: BatchReader, recipe: Recipe) -> list[LayerSimilarity]:
        """Every image layer with every text layer; nothing where too few captions and groups differ."""
        tally = BadSampleLimit(len(self.index), recipe.data.max_bad_fraction)
        numbers = _distinct_pairs(self.index)
        if len(numbers) <= _NEIGHBOURS:
            return []
        image, text = PairFeatures(model, sides, self.index, tally).rows(numbers, 0)
        if len(image) <= _NEIGHBOURS:
            return []
        both = ((tower, features.cpu()) for tower, features in ((model.image, image), (model.text, text)))
        return layer_similarity(*(_layers(tower, features) for tower, features in both), neighbours=_NEIGHBOURS)


def _layers(tower: Tower, features: Float[Tensor, "n D"]) -> dict[int, Float[Tensor, "n _"]]:
    """The pooled features of each layer by block, from 1."""
    widths = [width for _, width in tower.pooled_layers]
    return {
        block: columns for (block, _), columns in zip(tower.pooled_layers, features.split(widths, dim=1), strict=True)
    }


def _distinct_pairs(index: PairIndex) -> Int[np.ndarray, " n"]:
    """At most ``_COMPARED_PAIRS`` pairs, each with a first caption and a group of its own, by a hash of the id."""
    first: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    for number, id in enumerate(index.ids):
        keys = {("text", int(index.caption[index.caption_offsets[number]])), ("group", int(index.group[number]))}
        if not keys & seen:
            seen |= keys
            first[id] = number
    return np.array(sorted(first[id] for id in hashed_subset(first, _COMPARED_PAIRS)), dtype=np.int64)
