"""``clasp doctor``: check the data of a recipe, and the memory, disk and steps that training will need.

Input: a recipe. Output: ``CheckReport``s as they are found: findings as text, and the same as facts in JSON. Note: the
pairs are split, the run planned and the feature cache planned (``plan_features``) as in training, so errors are the
same as in training. Weights are loaded, since the cache key contains their hash; but nothing is run through a tower,
except one blank input where its frozen prefix ends at a block, and where a forecast is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache

from clasp.commands.closed_form import attention_of_runs
from clasp.commands.disk_space import plan_run_features, require_room_for_features
from clasp.commands.forecast import check_forecast
from clasp.config.build import (
    ModelAndPreprocessing,
    build_feature_source,
    build_model,
    build_model_and_preprocessing,
    class_pairs_of_recipe,
)
from clasp.config.datasets import open_training_pairs
from clasp.config.recipe import Recipe
from clasp.config.run_plan import plan_run
from clasp.data.checks import CheckReport, Finding, check_captions, check_images, check_pairs
from clasp.data.duplicate_checks import check_near_duplicates
from clasp.data.pairs import Pairs
from clasp.data.readers import PairIndex
from clasp.data.text_checks import check_classes, check_languages
from clasp.errors import counted
from clasp.models.cache_policy import CachePlan, CachePolicy
from clasp.models.features import FeatureSource
from clasp.models.frozen import FrozenPrefix, FrozenTower
from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.training.trackers.registry import find_trackers
from clasp.types import ProgressFactory, UserError, no_progress_bar

_CACHED_AUGMENTATIONS = "data.cached_augmentations=4"
_INTERNAL = ("key", "started_bytes")  # of a plan, and not among the facts


def diagnose(
    recipe: Recipe, *, bar: ProgressFactory = no_progress_bar, measured: bool = False
) -> Iterator[CheckReport]:
    """Run all checks, cheap ones first; ``measured``: and a forecast from a few steps, unless a check stops training.
    Raises the same ``UserError`` as training. Fixes that are no recipe with the other settings are left out."""
    fits = cache(lambda fix: fits_recipe(recipe, fix))
    for report in _run_checks(recipe, lambda override: fits((override,)), bar, measured):
        findings = [each if not each.fix or fits(each.fix) else replace(each, fix=()) for each in report.findings]
        yield replace(report, findings=findings)


def _run_checks(
    recipe: Recipe, fits: Callable[[str], bool], bar: ProgressFactory, measured: bool
) -> Iterator[CheckReport]:
    if measured and recipe.auto is not None:
        raise UserError("--measure: a recipe with [auto] takes its budget; its steps are timed when training begins")
    find_trackers(recipe.train.trackers)
    train, val = open_training_pairs(recipe)
    yield check_pairs(train, val, held_out=recipe.data.val is None and recipe.data.max_pairs is None)
    if balance := check_classes(train, val):
        yield balance
    yield check_parameters(recipe)
    listing = PairIndex(train)
    parts = build_model_and_preprocessing(recipe, lambda: listing.texts)
    yield (captions := check_captions(listing, parts.tokenizer, fits))
    yield check_languages(train, parts.tokenizer, recipe.text.tower or "")
    yield (images := check_images(train, val, parts.transform, recipe.data.max_bad_fraction, bar))
    yield check_near_duplicates(train, val, bar)
    classes = class_pairs_of_recipe(recipe, parts.model)
    if classes is not None:
        facts = {"classes": classes.pairs.classes, "texts": len(classes.pairs.texts), "weight": classes.weight}
        yield CheckReport("class_pairs", {**facts, "source": classes.source}, [Finding("ok", "classes", str(classes))])
    inputs = build_feature_source(parts, recipe)
    yield check_towers(parts, recipe, inputs)
    with attention_of_runs(recipe):
        caches = plan_run_features(recipe, inputs, train, val, listing, classes)
    yield (disk := check_feature_cache(caches, inputs.cache))
    yield (steps := check_steps(recipe, train, inputs))
    found = [finding for each in (captions, images, disk, steps) for finding in each.findings]
    if measured and not any(finding.level == "stop" for finding in found):
        yield check_forecast(recipe, (train, val), plan_run(recipe, train, inputs), caches, bar)


def fits_recipe(recipe: Recipe, fix: Sequence[str]) -> bool:
    """Whether overrides change the recipe, and the towers and its other settings take them."""
    try:
        changed = recipe.with_overrides(fix)
        build_model(changed, meta=True)
    except UserError:
        return False
    return changed != recipe


def raise_on_stop(sections: Sequence[CheckReport]) -> None:
    """Raises ``UserError`` that names what would stop training."""
    stops = [finding.about for section in sections for finding in section.findings if finding.level == "stop"]
    if stops:
        raise UserError(f"training would stop: {', '.join(dict.fromkeys(stops))}, as found above")


# --- the run ---------------------------------------------------------------------------------------------------------


def check_steps(recipe: Recipe, train: Pairs, inputs: FeatureSource) -> CheckReport:
    """Batch size, epochs and steps, or why there can be none; of a recipe with a budget, the budget."""
    if recipe.auto is not None:
        text = f"{recipe.auto}: heads in closed form, then as many epochs of tuning as fit, timed when training begins"
        return CheckReport("steps", recipe.auto.model_dump(exclude_none=True), [Finding("ok", "steps", text)])
    try:
        plan = plan_run(recipe, train, inputs)
    except UserError as error:
        return CheckReport("steps", {}, [Finding("stop", "steps", str(error), _mend_steps(recipe, train, inputs))])
    return CheckReport("steps", asdict(plan), [Finding("ok", "steps", plan.reason)])


def _mend_steps(recipe: Recipe, train: Pairs, inputs: FeatureSource) -> tuple[str, ...]:
    """The overrides with which there are steps."""
    fix = ("train.batch_size=auto",)
    try:
        plan_run(recipe.with_overrides(fix), train, inputs)
        return fix
    except UserError:
        if recipe.data.class_ratio is None:  # too few pairs
            return ()
    views = () if recipe.data.augment is None else (_CACHED_AUGMENTATIONS,)
    return ('tune.image=["none"]', 'tune.text=["none"]', "data.feature_cache=auto", *views)


def check_parameters(recipe: Recipe) -> CheckReport:
    """Trainable parameters of each part."""
    counts = build_model(recipe, meta=True).parameter_counts()
    made = CheckReport("trains", {name: asdict(count) for name, count in counts.items()})
    whole = counts.pop("model")
    parts = ", ".join(f"{name} {count.trained:,}" for name, count in counts.items())
    made.add_finding("ok", f"{whole.trained:,} of {whole.total:,} parameters ({whole.percent:.2f} %): {parts}")
    return made


def check_towers(parts: ModelAndPreprocessing, recipe: Recipe, inputs: FeatureSource) -> CheckReport:
    """The number of frozen blocks of each tower."""
    made = CheckReport("towers", {})
    for tower, part in ((parts.model.image, inputs.frozen_image_part), (parts.model.text, inputs.frozen_text_part)):
        blocks = len(find_structure(tower.net).blocks)
        frozen = blocks if tower.fully_frozen else tower.frozen_blocks
        facts = {"tower": tower.name, "blocks": blocks, "frozen_blocks": frozen, "wholly_frozen": tower.fully_frozen}
        made.facts[tower.modality] = facts
        made.add_finding("ok", f"{tower.modality} {tower.name}: {_describe_boundary(tower, part, frozen, blocks)}")
    if recipe.data.augment and not recipe.data.cached_augmentations and inputs.frozen_image_part:
        made.add_finding(
            "look",
            "the frozen part of the image tower runs in every step: data.augment is on, data.cached_augmentations is 0",
            _CACHED_AUGMENTATIONS,
        )
    return made


def _describe_boundary(tower: Tower, part: FrozenTower | FrozenPrefix | None, frozen: int, blocks: int) -> str:
    if not frozen and not tower.fully_frozen:
        return f"trains from the first of its {blocks} blocks on"
    text = "wholly frozen" if tower.fully_frozen else f"the first {frozen} of {counted(blocks, 'block')} frozen"
    if part is None:
        text += ", and run in every step: " + ("dropout is on" if tower.dropout else "data.feature_cache = 'off'")
    return text


def check_feature_cache(plans: Sequence[CachePlan], cache: CachePolicy) -> CheckReport:
    """Size of the cached features in bytes, whether they exist already, and whether they fit on the disk."""
    made = CheckReport("features", {"free_bytes": cache.free_bytes(), "feature_cache": []})
    for plan in plans:
        facts = {**asdict(plan), "file": str(plan.file) if plan.file else None}
        made.facts["feature_cache"].append({key: value for key, value in facts.items() if key not in _INTERNAL})
        text = f"{plan.count:,} {plan.what}: {plan.bytes:,} bytes"
        if plan.storage is None:
            made.add_finding(
                "look", f"{text} of hidden states, too many to cache: recomputed each time", "data.feature_cache=int8"
            )
        else:
            made.add_finding(
                "ok", f"{text} in {plan.storage}, {'there already' if plan.file else 'to be computed once'}"
            )
    try:
        require_room_for_features(plans, cache)
    except UserError as error:
        made.add_finding("stop", str(error), "data.feature_cache=off")
        return made
    if plans:
        more = sum(plan.bytes_to_write for plan in plans)
        made.add_finding("ok", f"{more:,} bytes to be written, of {made.facts['free_bytes']:,} that are free on disk")
    else:
        made.add_finding("ok", "nothing is cached: no part of a tower is frozen, or the feature cache is off")
    return made
