"""The plan of an automatic run: measurements in, recipes and reasons out; and the budget as a recipe has it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from clasp.config.auto_plan import (
    TUNINGS,
    LayerSet,
    Left,
    StagePlan,
    StepTiming,
    few_pairs,
    first_candidates,
    fit_heads,
    fit_tuning,
    layer_sets,
    plan_closed_form,
    plan_heads,
    plan_last_layers,
    plan_tuning,
    tunings_in,
)
from clasp.config.recipe import Recipe, read_recipe
from clasp.types import UserError

SPECS = {"image": ["lora(rank=8)", "norms"], "text": ["lora(rank=8)", "norms"]}


def auto(*overrides: str) -> Recipe:
    return read_recipe("auto", ["data.train=pairs.csv", *overrides])


def tuning(recipe: Recipe) -> StagePlan:
    chosen = first_candidates(layer_sets(12, ()), layer_sets(6, ()), 384)[1]
    base = plan_closed_form(recipe, chosen, "best").recipe
    return plan_tuning(base, 3, "runs/a/stages/1-closed-form", TUNINGS[0], SPECS)


def test_layers_are_the_last_the_upper_half_and_all():
    assert [each.extra for each in layer_sets(4, ())] == [(), (2, 3), (1, 2, 3)]
    assert [each.extra for each in layer_sets(1, ())] == [()]
    assert layer_sets(12, [3, 7]) == [LayerSet("given", (3, 7))]
    assert layer_sets(12, [10, 11]) == [LayerSet("10 to 12", (10, 11))] and layer_sets(2, [1])[0].name == "given"
    pairs = [(one.image.name, one.text.name) for one in first_candidates(layer_sets(12, ()), layer_sets(6, ()), 384)]
    assert pairs[:3] == [("last", "last"), ("all", "all"), ("upper half", "upper half")]
    assert pairs[3:] == [("all", "last"), ("last", "all")]
    assert {one.width for one in first_candidates(layer_sets(12, ()), layer_sets(6, ()), 32)} == {32}


def test_the_closed_form_is_a_recipe_without_a_step():
    chosen = first_candidates(layer_sets(12, ()), layer_sets(6, ()), 384)[1]._replace(ridge=(3.0, 0.3), width=128)
    recipe = plan_closed_form(auto(), chosen, "best").recipe
    assert recipe.auto is None and recipe.train.epochs == 0 and recipe.head.init == "cca"
    assert recipe.image.extra_layers == list(range(1, 12)) and recipe.text.extra_layers == [1, 2, 3, 4, 5]
    assert recipe.head.ridge == (3.0, 0.3) and recipe.head.width == 128 and recipe.tune.image == ["none"]


def test_heads_of_the_last_layers_are_as_wide_as_these_allow():
    chosen = first_candidates(layer_sets(12, ()), layer_sets(6, ()), 384)[1]._replace(width=512)
    last = plan_last_layers(plan_closed_form(auto(), chosen, "best").recipe, 384)
    assert last is not None and last.recipe.head.width == 384 and last.recipe.image.extra_layers == []
    chosen = first_candidates(layer_sets(12, ()), layer_sets(6, ()), 384)[0]
    assert plan_last_layers(plan_closed_form(auto(), chosen, "best").recipe, 384) is None


def test_a_later_stage_starts_from_an_earlier_one():
    planned = tuning(auto())
    assert (
        planned.recipe.train.init_from == "runs/a/stages/1-closed-form" and planned.recipe.tune.image == SPECS["image"]
    )
    assert planned.recipe.train.lr == 2e-3 and planned.recipe.train.lr_factors.head == 0.5
    assert plan_heads(planned.recipe, 2, "runs/a").recipe.head.noise == 1.0


@pytest.mark.parametrize(
    ("left", "epochs"),
    [
        (Left(1000.0, None), 8),  # 920 s of 100 s of steps and 10 s of evaluation an epoch, 10 s before
        (Left(370.0, None), 3),
        (Left(1e5, None), 15),
        (Left(None, 450), 4),
    ],
)
def test_epochs_fit_what_is_left(left: Left, epochs: int):
    fitted = fit_tuning(tuning(auto()), StepTiming(1.0, 10.0, 100), left)
    assert isinstance(fitted, StagePlan) and fitted.recipe.train.epochs == epochs, fitted
    assert str(left) in fitted.reason and fitted.recipe.data.augment is not None
    assert fitted.recipe.train.evaluate_every == -(-epochs // 10) and fitted.recipe.train.max_steps is None


@pytest.mark.parametrize(
    ("left", "steps"),
    [
        (Left(120.0, None), 100),  # 92 % of it, less an evaluation
        (Left(119.0, None), 99),
        (Left(250.0, None), 220),
        (Left(36.0, None), 23),
        (Left(19.0, None), None),
        (Left(None, 99), 99),
        (Left(None, 7), None),
    ],
)
def test_a_few_epochs_need_not_be_whole(left: Left, steps: int | None):
    fitted = fit_tuning(tuning(auto()), StepTiming(1.0, 10.0, 100), left)
    if steps is None:
        assert isinstance(fitted, str) and "fit into the" in fitted
        return
    assert isinstance(fitted, StagePlan) and fitted.recipe.train.max_steps == steps, fitted
    assert fitted.recipe.train.epochs == -(-steps // 100) and fitted.recipe.train.select == "last"
    assert fitted.recipe.train.evaluate_every == "end"
    assert Left(100.0, None).after(30.0) == Left(70.0, None) and Left(None, 5).after(30.0) == Left(None, 5)


def test_steps_without_evaluations_end_with_the_few_epochs():
    left = Left(150.0, None)
    fitted = fit_tuning(tuning(auto()), StepTiming(1.0, 40.0, 8), left)
    assert isinstance(fitted, StagePlan) and fitted.recipe.train.max_steps == 24 and fitted.recipe.train.epochs == 3
    heads = fit_heads(plan_heads(auto("train.select=last"), 6, "runs/a"), StepTiming(0.1, 1.0, 7), left)
    assert isinstance(heads, StagePlan) and heads.recipe.train.evaluate_every == 5, "the user's choice is of weights"


@pytest.mark.parametrize(
    ("overrides", "size"),
    [([], 64), (["loss.negatives=64"], 64), (["loss.negatives=65"], "auto"), (["train.batch_size=32"], 32)],
)
def test_batches_of_short_tuning_are_as_the_recipe_allows(overrides: Sequence[str], size: int | str):
    method = tunings_in(1.0, 7197)[0]
    recipe = plan_tuning(auto(*overrides), 2, "runs/a", method, {"image": SPECS["image"]}).recipe
    assert recipe.train.batch_size == size


def test_little_time_for_many_pairs():
    assert few_pairs(1.0, 7197) == few_pairs(2.9, 4096) == 2048
    assert few_pairs(1.0, 4095) is few_pairs(3.0, 7197) is few_pairs(None, 7197) is None
    assert tunings_in(1.0, 7197)[0].towers == tunings_in(2.0, 7197)[0].towers == ("image",)
    assert tunings_in(2.5, 7197) == tunings_in(1.0, 800) == tunings_in(None, 7197) == TUNINGS


def test_heads_take_what_is_left_until_they_settle():
    heads, timing = plan_heads(tuning(auto()).recipe, 2, "runs/a"), StepTiming(0.1, 1.0, 7)
    few, many = fit_heads(heads, timing, Left(10.0, None)), fit_heads(heads, timing, Left(6000.0, None))
    assert isinstance(few, StagePlan) and isinstance(many, StagePlan)
    assert few.recipe.train.epochs == 4 and many.recipe.train.epochs == 43, "300 steps"
    assert isinstance(fit_heads(heads, timing, Left(None, 6)), str)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["auto.minutes=0"], "auto.minutes = 0 should be greater than 0"),
        (["auto.minutes=-1"], "auto.minutes = -1 should be greater than 0"),
        (["auto.minutes=abc"], "auto.minutes = 'abc' should be a valid number"),
        (["auto.steps=9"], "minutes = 30 and steps = 9"),
        (["auto.hours=2"], "unknown key 'auto.hours'"),
        (['tune.text=["norms"]'], r"tune.text is chosen by \[auto\]"),
        (["head.width=64"], r"head is chosen by \[auto\]"),
        (["train.lr=1e-4"], r"train.lr is chosen by \[auto\]"),
        (["train.lr=1e-3"], r"train.lr is chosen by \[auto\]"),  # its default, which would not be kept either
        (['tune.text=["none"]'], r"tune.text is chosen by \[auto\]"),
        (["head.width=512"], r"head.width is chosen by \[auto\]"),
        (["train.epochs=3"], r"train.epochs is chosen by \[auto\]"),
        (["image.pool=attention"], r"image.pool = 'attention' is trained"),
        (["data.feature_cache=off"], r"\[auto\] compares closed forms on cached features"),
    ],
)
def test_one_line_for_what_cannot_be(overrides: Sequence[str], said: str):
    with pytest.raises(UserError, match=said) as refused:
        auto(*overrides)
    assert "\n" not in str(refused.value)


def test_a_budget_replaces_that_of_the_recipe():
    assert read_recipe("start").auto != read_recipe("auto").auto
    assert str(read_recipe("start", budget={"steps": "500"}).auto) == "500 steps"
    assert str(read_recipe("auto", budget={"minutes": "2.5"}).auto) == "2.5 minutes"
    with pytest.raises(UserError, match=r"lilt/lwa has no \[auto\]"):
        read_recipe("lilt/lwa", budget={"minutes": "3"})
    with pytest.raises(UserError, match="minutes = 3 and steps = 4"):
        read_recipe("auto", budget={"minutes": "3", "steps": "4"})
