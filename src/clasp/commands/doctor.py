"""What is odd about the pairs of a recipe, and what training will take, before any of it.

In goes a recipe, out come ``Section``s as they are found: findings for people, the same as facts for programs. Unusual:
the parts that training has are asked, and stopped short of computing: the pairs as it will split them, the plan it
will make, and the reader of inputs, which writes down what it would keep. So a recipe that training would refuse is
refused here in the same words. Weights are loaded, after the pairs have been told about, since a cache is known by
their hash; but nothing goes through a tower, except one blank input where its trunk ends at a block.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from clasp.commands.dry_run import Forecast
from clasp.commands.train import cache_folder, inputs_of, planned, training_pairs
from clasp.config.build import Assembled, assemble, build
from clasp.config.recipe import Recipe
from clasp.data.checks import Finding, Section, of_captions, of_images, of_pairs
from clasp.data.pairs import Pairs
from clasp.data.readers import Listing
from clasp.evaluation.from_pairs import validation
from clasp.evaluation.tasks import ZeroShot
from clasp.models.features import Bar, Inputs, no_bar
from clasp.models.frozen import Trunk, Whole
from clasp.models.structure import anatomy
from clasp.models.tower import Tower
from clasp.types import UserError


def diagnose(recipe: Recipe, *, bar: Bar = no_bar) -> Iterator[Section]:
    """Look at everything, what is cheap first. Raises ``UserError`` where training would, in its words."""
    train, val = training_pairs(recipe)
    yield of_pairs(train, val)
    yield of_counts(recipe)
    listing = Listing(train)
    parts = assemble(recipe, lambda: listing.texts)
    yield of_captions(listing, parts.tokenizer)
    yield of_images(train, val, parts.transform, recipe.data.max_bad_fraction, bar)
    forecast = inputs_of(parts, recipe, kind=Forecast)
    yield of_towers(parts, recipe, forecast)
    yield of_features(parts, recipe, forecast, train, val, listing)
    plan = planned(recipe, train, forecast)
    yield Section("steps", asdict(plan), [Finding("ok", "steps", plan.reason)])


def stops(sections: Sequence[Section]) -> None:
    """Raises ``UserError`` with the first finding that would stop training."""
    for section in sections:
        for finding in section.findings:
            if finding.level == "stop":
                raise UserError(finding.text)


# --- the run ---------------------------------------------------------------------------------------------------------


def of_counts(recipe: Recipe) -> Section:
    """Who trains."""
    counts = build(recipe, meta=True).counts()
    made = Section("trains", {name: asdict(count) for name, count in counts.items()})
    whole = counts.pop("model")
    parts = ", ".join(f"{name} {count.trained:,}" for name, count in counts.items())
    made.say("ok", f"{whole.trained:,} of {whole.total:,} parameters ({whole.percent:.2f} %): {parts}")
    return made


def of_towers(parts: Assembled, recipe: Recipe, inputs: Inputs) -> Section:
    """Up to where each tower stays as it is."""
    made = Section("towers", {})
    for tower, part in ((parts.model.image, inputs.image_part), (parts.model.text, inputs.text_part)):
        blocks = len(anatomy(tower.net).blocks)
        frozen = blocks if tower.wholly_frozen else tower.frozen_blocks
        facts = {"tower": tower.name, "blocks": blocks, "frozen_blocks": frozen, "wholly_frozen": tower.wholly_frozen}
        made.facts[tower.modality] = facts
        made.say("ok", f"{tower.modality} {tower.name}: {_boundary(tower, part, frozen, blocks)}")
    if recipe.data.augment and not recipe.data.views and inputs.image_part:
        made.say("look", "the frozen part of the image tower runs in every step: data.augment is on, data.views is 0")
    return made


def _boundary(tower: Tower, part: Whole | Trunk | None, frozen: int, blocks: int) -> str:
    if not frozen and not tower.wholly_frozen:
        return f"trains from the first of its {blocks} blocks on"
    text = "wholly frozen" if tower.wholly_frozen else f"the first {frozen} of {blocks} blocks are frozen"
    if part is None:
        text += ", and run in every step: " + ("dropout is on" if tower.dropout else "data.features = 'off'")
    return text


def of_features(
    parts: Assembled, recipe: Recipe, forecast: Forecast, train: Pairs, val: Pairs, listing: Listing
) -> Section:
    """What the frozen parts say once and for all: how much of it, and whether it is there."""
    free = forecast.free_bytes()
    forecast.image_side(train, recipe.data.augment)
    forecast.text_side(listing)
    if parts.model.image_head.standardize is not None:
        forecast.image_side(train, None)  # heads start from the plain pictures
    question = validation(train, val, forecast)
    if isinstance(question, ZeroShot):
        forecast.text_features(question.question.classes)
    made = Section("features", {"free_bytes": free, "kept": []})
    for keeping in forecast.noted:
        facts = {**asdict(keeping), "file": str(keeping.file) if keeping.file else None}
        made.facts["kept"].append({key: value for key, value in facts.items() if key != "key"})
        text = f"{keeping.count:,} {keeping.what}: {keeping.bytes:,} bytes"
        if keeping.storage is None:
            made.say("look", f"{text} of states, too many to keep: computed anew each time")
        else:
            made.say("ok", f"{text} in {keeping.storage}, {'there already' if keeping.file else 'to be computed once'}")
        free -= keeping.more_bytes
        if free < 0:
            folder = cache_folder() / "features"
            made.say("stop", f"cannot keep {keeping.bytes:,} bytes in {folder}: {os.strerror(errno.ENOSPC)}")
            return made
    if forecast.noted:
        more = sum(keeping.more_bytes for keeping in forecast.noted)
        made.say("ok", f"{more:,} bytes to be written, of {made.facts['free_bytes']:,} that are free on disk")
    else:
        made.say("ok", "nothing is kept: no part of a tower answers the same twice")
    return made
