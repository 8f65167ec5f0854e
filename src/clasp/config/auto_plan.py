"""The plan of ``clasp train auto``: measurements in, recipes of stages with their reasons out.

Input: the user's recipe with ``[auto]``, the closed form that validation chose, the time of a step. Output: a
``StagePlan`` for each stage. Defaults are those that were best on 8,000 pairs, a ViT-S and a MiniLM (``dev/LOG.md``).
Note: nothing is computed here. Every stage is an ordinary recipe; repeating it repeats its weights. Long: the
measured defaults of all stages, and how each stage is fitted into what is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.errors import counted

CLOSED_FORM_STAGE, LAST_LAYERS_STAGE = "1-closed-form", "1-last-layers"
ALL_PAIRS_STAGE = "1-closed-form-of-all-pairs"
TUNED_CLOSED_FORM = "closed-form-of-tuned"
RIDGES = ((1.0, 1.0), (0.3, 0.3), (3.0, 3.0), (10.0, 10.0), (3.0, 0.3), (0.3, 3.0))
"""Ridge penalties (image, text): the first with every set of layers, the others with the best one"""
START_RIDGES = RIDGES[:2]
"""Those of heads that tuning starts from, and replaces"""
TUNED_RIDGES = ((0.3, 0.3), (0.1, 0.1), (1.0, 1.0), (3.0, 3.0))
"""Those for tuned towers, whose features need less"""
CLASS_WEIGHTS = (0.0, 3.0, 10.0, 30.0)
"""Training pairs that a class counts as, where the image tower has a classifier (``data.class_weight``)"""
FEWEST_STEPS = 8
"""Steps of tuning that are worth the closed form of the tuned towers, where an epoch has as many"""
SEARCH_WIDTH, WIDTHS = 256, (64, 128, 256, 512)
"""Head widths: that of the search, and those tried with the best layers and ridge"""
_HEAD_STEPS = 300  # after which heads on cached features have settled
_RESERVE = 0.08  # of the time left, for saving, loading and the final evaluation
_MAX_EPOCHS, _MIN_MAX_STEPS = 15, 1500  # tuning flattens at the larger of both; then another method is worth more
_MAX_EVALUATIONS = 10
_FEW_EPOCHS = 3  # fewer of them need not be whole
_SHORT_MINUTES, _FEW_PAIRS = 3, 2048  # below, the first closed form is of so many pairs: tuning starts from it
_IMAGES_ALONE_MINUTES = 2.5  # below, the image tower is tuned alone where pairs are many


class LayerSet(NamedTuple):
    """Layers pooled in addition to the last."""

    name: str
    extra: tuple[int, ...]


class Candidate(NamedTuple):
    """Heads in closed form: the layers of both towers, ridge (image, text), width, and the weight of a class pair."""

    image: LayerSet
    text: LayerSet
    ridge: tuple[float, float]
    width: int
    class_weight: float = 0.0

    def __str__(self) -> str:
        layers = self.image.name if self.image.name == self.text.name else f"{self.image.name} / {self.text.name}"
        ridge = " / ".join(f"{each:g}" for each in dict.fromkeys(self.ridge))
        classes = f", class pairs {self.class_weight:g}" if self.class_weight else ""
        return f"{layers}, ridge {ridge}, width {self.width}{classes}"


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: the name of its folder, its recipe, and why it is as it is."""

    name: str
    method: str
    reason: str
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Measured seconds of a step and of an evaluation, the steps of an epoch, and seconds of the pooled features of all
    pairs."""

    step: float
    evaluation: float
    steps_per_epoch: int
    features: float = 0.0

    def epochs_in(self, seconds: float) -> int:
        """Whole epochs that fit, with at most ``_MAX_EVALUATIONS`` evaluations; each epoch has one up to there."""
        epoch = self.steps_per_epoch * self.step
        few = int((seconds - self.evaluation) // (epoch + self.evaluation))
        if few <= _MAX_EVALUATIONS:
            return max(0, few)
        return int((seconds - (1 + _MAX_EVALUATIONS) * self.evaluation) // epoch)


@dataclass(frozen=True, slots=True)
class TowerTuning:
    """Methods for towers, both or one, with learning rate and factors, and the batch size where the user has none."""

    name: str
    specs: tuple[str, ...]
    lr: float
    lr_factors: tuple[tuple[str, float], ...] = ()
    towers: tuple[Literal["image", "text"], ...] = ("image", "text")
    batch_size: int | None = None


TUNINGS = (
    TowerTuning("low rank and norms", ("lora(rank=8)", "norms"), 2e-3, (("head", 0.5), ("scale", 0.5))),
    TowerTuning("adapters and norms", ("adapters(reduction=4)", "norms"), 1e-3),
    TowerTuning("full", ("full",), 1e-3, (("tower", 0.03), ("norm", 0.03))),
)
"""Tuned inside both towers, best first; a later one is tried where the budget holds both"""
SHORT_TUNINGS = (
    replace(TUNINGS[0], name="low rank and norms of images", towers=("image",), batch_size=64),
    *TUNINGS[1:],
)
"""Those where time is short for the pairs: in the image tower alone a step is cheaper, and was worth more (LOG); more
steps of half the pairs were, too"""


def layer_sets(blocks: int, given: Sequence[int] | str) -> list[LayerSet]:
    """The sets of layers to try: those of the recipe where it has some, else the last, the upper half, and all."""
    if given != "all" and given:
        extra = tuple(layer for layer in given if isinstance(layer, int))
        upper = extra == tuple(range(extra[0], blocks)) and extra[0] > 1 if extra else False
        return [LayerSet(f"{extra[0]} to {blocks}" if upper else "given", extra)]
    sets = [LayerSet("last", ()), LayerSet("upper half", upper_half(blocks))]
    sets.append(LayerSet("all", tuple(range(1, blocks))))
    return list({each.extra: each for each in sets}.values())


def upper_half(blocks: int) -> tuple[int, ...]:
    """The layers of the upper half of the blocks below the last."""
    return tuple(range(max(1, blocks // 2), blocks))


def first_candidates(
    image: Sequence[LayerSet],
    text: Sequence[LayerSet],
    narrower: int,
    class_weight: float = 0.0,
    ridge: tuple[float, float] = RIDGES[0],
) -> list[Candidate]:
    """The layers to try, at one ridge and width: both sides alike first, then the ends of one with those of the other.

    ``narrower``: the width of the narrower side of the last layers, the most that a head of them can have.
    """
    count = max(len(image), len(text))
    places = dict.fromkeys([0, count - 1, *range(count)])  # the last layers, then all: where time is short, those two
    alike = [(image[min(place, len(image) - 1)], text[min(place, len(text) - 1)]) for place in places]
    mixed = [(image[-1], text[0]), (image[0], text[-1])]
    width = min(SEARCH_WIDTH, narrower)
    return [Candidate(*pair, ridge, width, class_weight) for pair in dict.fromkeys([*alike, *mixed])]


def few_pairs(minutes: float | None, pairs: int) -> int | None:
    """The pairs of the first closed form where there is little time for many; ``None`` where it is of all."""
    return _FEW_PAIRS if minutes is not None and minutes < _SHORT_MINUTES and pairs >= 2 * _FEW_PAIRS else None


def tunings_in(minutes: float | None, pairs: int) -> tuple[TowerTuning, ...]:
    """The methods of tuning that a budget is planned with."""
    short = minutes is not None and minutes < _IMAGES_ALONE_MINUTES and few_pairs(minutes, pairs) is not None
    return SHORT_TUNINGS if short else TUNINGS


def plan_closed_form(recipe: Recipe, chosen: Candidate, reason: str, name: str = CLOSED_FORM_STAGE) -> StagePlan:
    """Stage 1: the chosen heads, without a gradient step."""
    head = {"kind": "linear", "width": chosen.width, "standardize": True, "init": "cca", "ridge": list(chosen.ridge)}
    changes = {
        "image": {"extra_layers": list(chosen.image.extra)},
        "text": {"extra_layers": list(chosen.text.extra)},
        "head": head,
        "data": {"class_weight": chosen.class_weight},
        "train": {"epochs": 0},
    }
    some = "" if recipe.data.max_pairs is None else f", of at most {recipe.data.max_pairs:,} pairs"
    return StagePlan(name, f"closed form, layers {chosen}{some}", reason, changed(recipe, changes))


def plan_last_layers(closed_form: Recipe, narrower: int) -> StagePlan | None:
    """The closed form of the last layers alone, to tune the towers from; ``None`` where ``closed_form`` is that.

    ``narrower``: the width of the narrower side of the last layers, the most that a head of them can have.

    Heads of all layers are better than those of the last ones while the towers are frozen, and overfit within an epoch
    once the towers are tuned (``dev/LOG.md``).
    """
    if not closed_form.image.extra_layers and not closed_form.text.extra_layers:
        return None
    last = changed(closed_form, {"image": {"extra_layers": []}, "text": {"extra_layers": []}})
    last = changed(last, {"head": {"width": min(last.head.width, narrower)}})
    reason = "where tuning inside the towers starts: heads of more layers overfit there"
    return StagePlan(LAST_LAYERS_STAGE, "closed form, last layers", reason, last)


def plan_heads(base: Recipe, number: int, start: str) -> StagePlan:
    """Gradient steps of the heads alone, on cached features, from the run ``start``; its epochs are still "auto"."""
    changes = {
        "head": {"noise": 1.0, "dropout": 0.3},
        "train": {"epochs": "auto", "lr": 3e-4, "init_from": start},
    }
    return StagePlan(f"{number}-heads", "heads by gradient steps", "", changed(base, changes))


def plan_tuning(base: Recipe, number: int, start: str, method: TowerTuning, specs: dict[str, list[str]]) -> StagePlan:
    """Tuning inside the towers from the run ``start``; ``specs``: what the towers take of the method."""
    train = {"epochs": 1, "lr": method.lr, "lr_factors": dict(method.lr_factors), "init_from": start}
    size, negatives = method.batch_size, base.loss.negatives
    if size is not None and base.train.batch_size == "auto" and (negatives == "all" or negatives <= size):
        train["batch_size"] = size
    changes: dict[str, Any] = {"head": {"noise": 0.0, "dropout": 0.0}, "tune": specs, "train": train}
    return StagePlan(tuning_stage_name(number, method), method.name, "", changed(base, changes))


def with_random_heads(tuning: Recipe) -> Recipe:
    """The recipe of tuning without the run it starts from, whose steps take as long."""
    changes = {"train": {"init_from": None}, "head": {"init": "random"}, "data": {"class_weight": None}}
    return changed(tuning, changes)


def tuning_stage_name(number: int, method: TowerTuning) -> str:
    """The name of the folder of a stage of tuning."""
    return f"{number}-{method.name.replace(' ', '-')}"


def plan_tuned_closed_form(tuned: Recipe, number: int, chosen: Candidate, reason: str) -> StagePlan:
    """The chosen heads for towers that a stage tuned; ``tuned``: the recipe of their search."""
    planned = plan_closed_form(tuned, chosen, reason)
    return StagePlan(f"{number}-{TUNED_CLOSED_FORM}", f"{planned.method}, of the tuned towers", reason, planned.recipe)


def tuned_closed_form_seconds(timing: StepTiming, search: float) -> float:
    """The time that the closed form of the tuned towers takes.

    ``search``: seconds of moments and a trial, and of a stage without steps. The features are those of the validation
    pairs too, whose evaluation takes about as long.
    """
    return timing.features + timing.evaluation + search


def fit_heads(plan: StagePlan, timing: StepTiming, left: Left) -> StagePlan | str:
    """The plan with the usual epochs, or as many as the budget holds; else why there is none."""
    fits = left.epochs(timing, 1.0 if left.seconds is None else 1 - _RESERVE)
    if fits < 1:
        return f"no epoch fits into {left}"
    epochs = min(fits, max(_MAX_EPOCHS, -(-_HEAD_STEPS // timing.steps_per_epoch)))
    reason = f"{counted(epochs, 'epoch')} on cached features, with {left}"
    return _with_epochs(plan, epochs, reason)


def fit_tuning(plan: StagePlan, timing: StepTiming, left: Left) -> StagePlan | str:
    """The plan with as many epochs as fit, or a part of a few; light augmentation where there are several; else why
    there is none.

    After few steps the last weights are taken, not those of the best evaluation: heads that are worse at first hide
    towers that are better, whose closed form comes next.
    """
    share = 1.0 if left.seconds is None else 1 - _RESERVE
    fits, steps = left.epochs(timing, share), left.few_steps(timing, share)
    of_epoch = f"an epoch is {counted(timing.steps_per_epoch, 'step')}"
    if left.seconds is not None:
        of_epoch += f" of {timing.step:.2g} s"
    if fits < _FEW_EPOCHS:
        if steps < min(FEWEST_STEPS, timing.steps_per_epoch):
            return f"{of_epoch}: {max(0, steps)} fit into {left}"
        epochs = -(-steps // timing.steps_per_epoch)
        plan = replace(plan, recipe=changed(plan.recipe, {"train": {"max_steps": steps, "select": "last"}}))
        reason = f"{of_epoch}: {counted(steps, 'step')} into {left}"
    else:
        epochs = min(fits, max(_MAX_EPOCHS, -(-_MIN_MAX_STEPS // timing.steps_per_epoch)))
        reason = f"{of_epoch}: {counted(epochs, 'epoch')}"
        reason += f" into {left}" if fits == epochs else f", {fits} would fit into {left}"
    if epochs > 1 and plan.recipe.data.augment is None:
        plan = replace(
            plan, recipe=changed(plan.recipe, {"data": {"augment": {"flip": 0.5, "crop_scale": [0.7, 1.0]}}})
        )
        reason += "; images flipped and cropped"
    return _with_epochs(plan, epochs, reason)


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of the budget: ``seconds``, or ``steps``."""

    seconds: float | None
    steps: int | None

    def epochs(self, timing: StepTiming, share: float) -> int:
        """Whole epochs that a share of it holds."""
        if self.steps is not None:
            return int(share * self.steps) // timing.steps_per_epoch
        assert self.seconds is not None
        return timing.epochs_in(share * self.seconds)

    def few_steps(self, timing: StepTiming, share: float) -> int:
        """Steps of at most ``_FEW_EPOCHS`` epochs that a share of it holds, with the evaluation after them."""
        if self.steps is not None:
            return int(share * self.steps)
        assert self.seconds is not None
        fits = int((share * self.seconds - timing.evaluation) / timing.step)
        return max(0, min(fits, _FEW_EPOCHS * timing.steps_per_epoch))

    def after(self, seconds: float) -> Left:
        """What is left once ``seconds`` have passed."""
        return Left(None if self.seconds is None else self.seconds - seconds, self.steps)

    @property
    def nothing(self) -> bool:
        """Whether the budget has ended."""
        return (self.seconds or 0) <= 0 and not self.steps

    def __str__(self) -> str:
        if self.steps is not None:
            return f"the {counted(self.steps, 'step')} left"
        assert self.seconds is not None
        return f"the {max(0, math.floor(self.seconds)):,} s left"


def _count(epochs: int) -> str:
    return f"{epochs} epoch{'s' if epochs > 1 else ''}"


def _with_epochs(plan: StagePlan, epochs: int, reason: str) -> StagePlan:
    every = "end" if plan.recipe.train.max_steps is not None else -(-epochs // _MAX_EVALUATIONS)
    recipe = changed(plan.recipe, {"train": {"epochs": epochs, "evaluate_every": every}})
    return replace(plan, reason=reason, recipe=recipe)


def changed(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe without ``[auto]``, with other values of some keys."""
    given = recipe.to_dict()
    given.pop("auto", None)
    for section, values in changes.items():
        given[section] = {**given.get(section, {}), **values}
    return recipe_from_dict(given, "auto")
