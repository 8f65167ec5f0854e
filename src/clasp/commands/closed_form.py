"""The closed form of ``clasp train auto`` and ``clasp pair``: heads of several sets of layers, ridges and widths,
compared on validation.

Input: both frozen towers with all their layers pooled, and the pairs. Output: ``ClosedFormTrial``s, and the one to
take: the smallest whose metric is within one standard error of the best. Note: features and their moments are computed
once; a trial selects columns, factors, and evaluates in memory with the run's own validation task. Long, since a
search and the heads that it leads to share one solution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from accelerate import PartialState
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clasp.config.auto_plan import (
    CLASS_WEIGHTS,
    RIDGES,
    WIDTHS,
    Candidate,
    LayerSet,
    changed,
    first_candidates,
    layer_sets,
    upper_half,
)
from clasp.config.build import build_model
from clasp.config.recipe import Recipe
from clasp.data.loader import BadSampleLimit, BatchReader
from clasp.evaluation.results import PrimaryScore
from clasp.evaluation.tasks import MultilingualTask, RetrievalTask, ZeroShotTask
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.models.heads import ProjectionHead
from clasp.models.precision import resolve_precision
from clasp.models.tower import Tower
from clasp.training.attention_kernel import choose_attention_kernel, use_attention_kernel
from clasp.training.cca import cca
from clasp.training.class_pairs import ClassPairFeatures, class_pair_features, find_class_pairs
from clasp.training.closed_form_heads import ClosedFormHeads, HeadInClosedForm
from clasp.training.initialize import closed_form_source, initialize_heads, standardized_moments
from clasp.training.moments import PairMoments
from clasp.types import ImageInput, MessageCallback, Pixels, PooledFeatures, ProgressCallback, TextInput, Tokens

ValidationTask = RetrievalTask | MultilingualTask | ZeroShotTask
SearchedLayers = Literal["all", "upper half", "last"]
_FIRST_TRIALS = 2  # made whatever the time: the last layers, and all
PAIRS_FOR_LAYERS = 256
"""Training pairs from which more than the last layers are searched beside class pairs, whose lower layers are predicted
from those of the training pairs. Flickr8k, mean recall on 250 held-out pairs, last layers against upper half: of 36
pairs 30.8 against 25.7 (another draw: 30.5, 24.0), of 128 pairs 33.6 against 27.4; more were not measured, 256 is
assumed (``dev/LOG.md``)"""


@dataclass(frozen=True, slots=True)
class ClosedFormTrial:
    """One candidate, its validation metric, and the bytes of its heads in a delta."""

    candidate: Candidate
    score: PrimaryScore
    delta_bytes: int
    seconds: float


@runtime_checkable
class TrialRecord(Protocol):
    """The trials of a search that went before (``commands.kept_trials``)."""

    def find(self, candidate: Candidate) -> ClosedFormTrial | None: ...

    def add(self, trial: ClosedFormTrial) -> None: ...


class ClosedFormSearch:
    """Tries candidates on the moments of all layers. ``model``: both towers frozen, heads that standardise.

    ``classes``: class pairs, whose weight is a candidate too unless the recipe has one."""

    def __init__(
        self,
        model: DualEncoder,
        recipe: Recipe,
        sides: BatchReader,
        tally: BadSampleLimit,
        task: ValidationTask,
        classes: ClassPairFeatures | None,
    ):
        self.model, self.recipe, self.task, self._pairs = model, recipe, task, len(sides.pairs)
        began = time.monotonic()
        initialize_heads(model, sides, recipe.head, tally)
        self.moments, self._classes = standardized_moments(model, sides, tally), classes
        self.seconds_of_moments = time.monotonic() - began
        self._maps: dict[Candidate, _Solution] = {}
        self._tried: list[Candidate] = []
        self._class_moments: tuple[float, PairMoments] | None = None

    def run(
        self,
        say: MessageCallback,
        out_of_time: Callable[[], bool],
        ridges: Sequence[tuple[float, float]] = RIDGES,
        widths: Sequence[int] = WIDTHS,
        kept: TrialRecord | None = None,
    ) -> list[ClosedFormTrial]:
        """Layers first, then the weight of class pairs with the best layers (whatever the time, none), the ridge, and
        the width; stops early when ``out_of_time``. Without ``widths``, that of the search alone. ``kept``: trials that
        are not made again, and where new ones go."""
        trials: list[ClosedFormTrial] = []
        layers = self._layer_candidates(ridges[0])
        weights = CLASS_WEIGHTS if self._classes is not None and self.recipe.data.class_weight is None else ()

        def attempt(candidates: Sequence[Candidate], at_least: int = 0) -> None:
            for place, candidate in enumerate(candidates):
                known = None if kept is None else kept.find(candidate)
                if known is None and place >= at_least and out_of_time():
                    return
                if all(candidate != trial.candidate for trial in trials):
                    trials.append(known or self._try(candidate))
                    self._tried.append(candidate)
                    if kept is not None and known is None:
                        kept.add(trials[-1])
                    say(f"{candidate}: {self.task.primary} {trials[-1].score.value:.4g}")

        attempt(layers, _FIRST_TRIALS)
        attempt([best_trial(trials).candidate._replace(class_weight=weight) for weight in weights], 1)
        attempt([best_trial(trials).candidate._replace(ridge=ridge) for ridge in ridges])
        best = best_trial(trials).candidate
        most = min(self._narrower(best.image, best.text), WIDTHS[-1])
        attempt([best._replace(width=width) for width in (*widths, most) if widths and width <= most])
        return trials

    def run_layers(self, progress: ProgressCallback = lambda done, total: None) -> list[ClosedFormTrial]:
        """The sets of layers alone, at one ridge and width: those that ``clasp train auto`` would search."""
        candidates, trials = self._layer_candidates(RIDGES[0]), []
        if self._classes is not None and self._pairs < PAIRS_FOR_LAYERS:
            candidates = candidates[:1]  # the last
        for candidate in candidates:
            trials.append(self._try(candidate))
            progress(len(trials), len(candidates))
        return trials

    def _layer_candidates(self, ridge: tuple[float, float]) -> list[Candidate]:
        image, text = (
            _available(
                tower,
                layer_sets(tower.pooled_layers[0][0], "all" if settings.extra_layers == "all" else tower.extra_layers),
            )
            for tower, settings in ((self.model.image, self.recipe.image), (self.model.text, self.recipe.text))
        )
        weight = self._classes.classes.weight if self._classes is not None else 0.0
        return first_candidates(image, text, self._narrower(image[0], text[0]), weight, ridge)

    def heads(self, candidate: Candidate) -> ClosedFormHeads:
        """The heads of a candidate that was tried."""
        image, text = self.model.image_head.standardize, self.model.text_head.standardize
        assert image is not None and text is not None
        columns = self._columns(candidate)
        found = self._solve(candidate, columns)
        return ClosedFormHeads(
            HeadInClosedForm.of(image, columns[0], found.image, found.image_mean),
            HeadInClosedForm.of(text, columns[1], found.text, found.text_mean),
        )

    def _columns(self, candidate: Candidate) -> tuple[Int[Tensor, " di"], Int[Tensor, " dt"]]:
        image, text = self.model.image, self.model.text
        return layer_columns(image, candidate.image.extra), layer_columns(text, candidate.text.extra)

    def _narrower(self, image: LayerSet, text: LayerSet) -> int:
        """The width of the narrower side, which no head can exceed."""
        return min(len(layer_columns(self.model.image, image.extra)), len(layer_columns(self.model.text, text.extra)))

    def _try(self, candidate: Candidate) -> ClosedFormTrial:
        began = time.monotonic()
        columns = self._columns(candidate)
        score = self.task.score(CandidateEncoder(self.model, self._solve(candidate, columns), *columns))
        numbers = sum((candidate.width + 2) * len(some) + candidate.width for some in columns) + 1
        return ClosedFormTrial(candidate, score, 4 * numbers, time.monotonic() - began)

    def _solve(self, candidate: Candidate, columns: tuple[Int[Tensor, " di"], Int[Tensor, " dt"]]) -> _Solution:
        """The maps of a candidate: the first directions of a wider one where that was tried before."""
        same = [known for known in self._tried if known._replace(width=candidate.width) == candidate]
        wider = next((known for known in same if known.width >= candidate.width), candidate)
        if wider not in self._maps:
            self._maps[wider] = self._solve_alone(wider, columns)
        found, width = self._maps[wider], candidate.width
        return _Solution(found.image[:width], found.text[:width], found.image_mean, found.text_mean)

    def _solve_alone(self, candidate: Candidate, columns: tuple[Int[Tensor, " di"], Int[Tensor, " dt"]]) -> _Solution:
        classes = None
        if self._classes is not None and candidate.class_weight:
            moments = self._moments_of_classes(self._classes, candidate.ridge[0])
            classes = moments.select(*columns), candidate.class_weight * self._classes.classes.pairs.classes
        source = closed_form_source(self.moments.select(*columns), self._pairs, classes)
        rows = int(source.moments.weight) if classes is None else None
        maps = cca(source.moments, candidate.width, ridge=candidate.ridge, rows=rows)
        return _Solution(maps.image, maps.text, source.image_mean, source.text_mean)

    def _moments_of_classes(self, classes: ClassPairFeatures, ridge: float) -> PairMoments:
        """Those of all layers, kept for the candidates that follow: most have the ridge of the one before."""
        if self._class_moments is None or self._class_moments[0] != ridge:
            image, text = self.model.image_head.standardize, self.model.text_head.standardize
            assert image is not None and text is not None
            self._class_moments = None  # before the next are made: each takes hundreds of megabytes
            self._class_moments = ridge, classes.moments(image, text, self.moments, ridge)
        return self._class_moments[1]


def with_layer_pools(recipe: Recipe) -> Recipe:
    """The recipe without ``[auto]``, poolings that were left out replaced by those for several layers."""
    model = build_model(changed(recipe, {}), meta=True)
    pools = {
        side: {"pool": tower.layer_pool}
        for side, settings, tower in (("image", recipe.image, model.image), ("text", recipe.text, model.text))
        if settings.pool is None and tower.layer_pool is not None
    }
    return changed(recipe, pools)


def search_recipe(recipe: Recipe, layers: SearchedLayers = "all") -> Recipe:
    """The recipe of a search: these layers of both towers, unless the recipe names some, and heads that standardise."""
    model = build_model(changed(recipe, {}), meta=True)
    extra = {
        side: {"extra_layers": settings.extra_layers or _extra_layers(tower, layers)}
        for side, settings, tower in (("image", recipe.image, model.image), ("text", recipe.text, model.text))
    }
    return changed(recipe, {**extra, "head": {"kind": "linear", "width": 1, "standardize": True}})


def may_have_class_pairs(recipe: Recipe) -> bool:
    """Whether the image tower is known to have a classifier, and the recipe does not leave class pairs out."""
    return recipe.data.class_weight != 0 and build_model(changed(recipe, {}), meta=True).image.has_classifier


def _extra_layers(tower: Tower, layers: SearchedLayers) -> list[int] | Literal["all"]:
    """The layers of a tower that pools several, in addition to the last."""
    if tower.layer_pool is None or layers == "last":
        return []
    return "all" if layers == "all" else list(upper_half(tower.pooled_layers[0][0]))


def tuned_search_recipe(recipe: Recipe, tuned: Recipe, run: str) -> Recipe:
    """The recipe of a search over the towers that ``run`` tuned, with the recipe ``tuned``; ``recipe``: the user's.

    The upper half of the layers: once tuned, these were better than all (``dev/LOG.md``). Class pairs are of the towers
    as they were before.
    """
    start = {"epochs": 0, "init_from": run, "init_parts": "towers"}
    changes = {"tune": tuned.tune.model_dump(), "data": {"class_weight": 0.0}, "train": start}
    return changed(search_recipe(recipe, "upper half"), changes)


def attention_of_runs(recipe: Recipe) -> AbstractContextManager[None]:
    """The attention kernel of the runs of a recipe; features in another one would be cached apart, computed twice."""
    device = PartialState().device
    assert device is not None
    precision = resolve_precision(recipe.train.precision, device).precision
    return use_attention_kernel(choose_attention_kernel(recipe.train.attention, precision, device).attention)


def begin_search(
    model: DualEncoder, recipe: Recipe, sides: BatchReader, task: ValidationTask, inputs: FeatureSource
) -> ClosedFormSearch:
    """The search over a model of ``search_recipe``, with the class pairs of its image tower where it has some."""
    tally = BadSampleLimit(len(sides.pairs), recipe.data.max_bad_fraction)
    found = find_class_pairs(model, recipe.data.class_weight)
    classes = class_pair_features(found, model, inputs) if found else None
    return ClosedFormSearch(model, recipe, sides, tally, task, classes)


class _Solution(NamedTuple):
    """The maps of heads in closed form, and the means that they subtract."""

    image: Float[Tensor, "E di"]
    text: Float[Tensor, "E dt"]
    image_mean: Float[Tensor, " di"]
    text_mean: Float[Tensor, " dt"]


def _available(tower: Tower, sets: Sequence[LayerSet]) -> list[LayerSet]:
    """The sets whose layers the tower pools; the last layer where those of the recipe cannot be pooled."""
    there = {block for block, _ in tower.pooled_layers}
    return [each for each in sets if there.issuperset(each.extra)]


def best_trial(trials: Sequence[ClosedFormTrial]) -> ClosedFormTrial:
    """The trial of the highest metric; the first of equal ones."""
    return max(trials, key=lambda trial: trial.score.value)


def choose_trial(trials: Sequence[ClosedFormTrial]) -> tuple[ClosedFormTrial, str]:
    """The smallest heads within one standard error (of the paired difference) of the best, and the reason."""
    best = best_trial(trials)
    near = [best]
    for trial in trials:
        change = trial.score.change_from(best.score)
        if trial is not best and -change.value <= change.standard_error:
            near.append(trial)
    chosen = min(near, key=lambda trial: (trial.delta_bytes, -trial.score.value))
    size = f"heads of {chosen.delta_bytes / 1e6:.1f} MB"
    if chosen is best:
        return chosen, f"best of {len(trials)} on validation; {size}"
    change = chosen.score.change_from(best.score)
    return chosen, (
        f"smallest of {len(trials)} within one standard error of the best ({100 * change.value:+.1f} points, "
        f"{best.delta_bytes / 1e6:.1f} MB): {size}"
    )


def choose_start(trials: Sequence[ClosedFormTrial]) -> tuple[ClosedFormTrial, str]:
    """The heads that tuning starts from: the best, however large (narrower ones leave the towers less to learn)."""
    return best_trial(trials), f"best of {len(trials)} on validation, to tune the towers from"


def layer_columns(tower: Tower, extra: Sequence[int]) -> Int[Tensor, " d"]:
    """The columns of the last layer and of ``extra`` in the pooled features of a tower of more layers."""
    parts, start, last = [], 0, tower.pooled_layers[0][0]
    for block, width in tower.pooled_layers:
        if block == last or block in extra:
            parts.append(torch.arange(start, start + width))
        start += width
    return torch.cat(parts)


class CandidateEncoder:
    """An ``Encoder``: some columns of the standardised features of all layers, through heads in closed form."""

    def __init__(self, model: DualEncoder, solution: _Solution, image: Int[Tensor, " di"], text: Int[Tensor, " dt"]):
        self.name, self.fingerprint = f"{model.name}, closed form", ""
        self._model, self._solution, self._image, self._text = model, solution, image, text

    def embed_image(self, inputs: ImageInput) -> Float[Tensor, "B E"]:
        pooled = inputs.values if isinstance(inputs, PooledFeatures) else self._model.image.pooled(inputs)
        return _embed(self._model.image_head, pooled, self._image, self._solution.image, self._solution.image_mean)

    def embed_text(self, inputs: TextInput) -> Float[Tensor, "B E"]:
        pooled = inputs.values if isinstance(inputs, PooledFeatures) else self._model.text.pooled(inputs)
        return _embed(self._model.text_head, pooled, self._text, self._solution.text, self._solution.text_mean)

    def encode_image(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E"]:
        return self.embed_image(Pixels(pixels))

    def encode_text(self, tokens: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B E"]:
        return self.embed_text(Tokens(tokens, mask))


def _embed(
    head: ProjectionHead,
    pooled: Float[Tensor, "B D"],
    columns: Int[Tensor, " d"],
    map: Float[Tensor, "E d"],
    mean: Float[Tensor, " d"],
) -> Float[Tensor, "B E"]:
    assert head.standardize is not None
    return F.normalize((head.standardize(pooled)[:, columns] - mean) @ map.T, dim=-1)
