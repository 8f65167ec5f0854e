"""What "auto" comes to, from 50 to ten million pairs, and the mistakes that are caught before any work."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from clasp.training.settings import LrFactors, TrainSettings, plan_training
from clasp.types import UserError


@pytest.mark.parametrize(
    ("pairs", "batch", "epochs", "steps"),
    [
        (2, 2, 300, 300),
        (50, 8, 50, 300),
        (1_000, 128, 43, 301),
        (3_338, 512, 50, 300),
        (100_000, 1024, 15, 1_455),
        (1_000_000, 1024, 5, 4_880),
        (10_000_000, 1024, 2, 19_530),
    ],
)
def test_auto(pairs: int, batch: int, epochs: int, steps: int) -> None:
    plan = plan_training(TrainSettings(), pairs)
    assert (plan.batch_size, plan.epochs, plan.steps) == (batch, epochs, steps)


def test_auto_keeps_its_promises_at_every_size() -> None:
    seen = 0
    for pairs in [*range(8, 3000, 7), *(10**power for power in range(4, 8))]:
        plan = plan_training(TrainSettings(), pairs)
        assert plan.batch_size & (plan.batch_size - 1) == 0 and 2 <= plan.batch_size <= min(1024, pairs / 4)
        assert plan.steps == plan.epochs * (pairs // plan.batch_size) >= 300
        assert plan.batch_size * 2 > min(1024, pairs / 4), "no larger power of two would do"
        assert plan.epochs * pairs > 0.6 * seen, "more data is never trained on much less"
        seen = plan.epochs * pairs


def test_what_is_set_is_kept_and_the_reason_says_so() -> None:
    plan = plan_training(TrainSettings(batch_size=20, epochs=3), 50)
    assert (plan.batch_size, plan.epochs, plan.steps) == (20, 3, 6)
    assert plan.reason == "50 pairs: batch 20 is set and 3 epochs are set, 6 steps in all"
    resolved = plan_training(TrainSettings(epochs=3), 4_000, max_batch_size=100)
    assert resolved.reason == (
        "4,000 pairs: batch 64 is the largest power of two that is at most 100 and 3 epochs are set, 186 steps in all"
    )
    settings = resolved.resolved(TrainSettings(epochs=3, lr=0.5))
    assert (settings.batch_size, settings.epochs, settings.lr) == (64, 3, 0.5)
    assert "50 epochs give at least 300 steps" in plan_training(TrainSettings(), 50).reason


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"train.batch_size = 512 is more than the 50 pairs to train on; at most 50"):
        plan_training(TrainSettings(batch_size=512), 50)
    with pytest.raises(UserError, match="at least two pairs to tell apart, and there is 1"):
        plan_training(TrainSettings(), 1)
    for wrong in [
        {"batch_size": 1},
        {"batch_size": "many"},
        {"lr": float("nan")},
        {"betas": (0.9, 1.0)},
        {"learning_rate": 1},
    ]:
        with pytest.raises(ValidationError):
            TrainSettings.model_validate(wrong)
    for wrong in [
        {"lr_factors": {"head": 0}},
        {"lr_factors": {"heads": 1}},
        {"schedule": "linear"},
        {"decay_filter": "all"},
    ]:
        with pytest.raises(ValidationError):
            TrainSettings.model_validate(wrong)


def test_the_warm_up_of_lilt_is_not_to_be_set() -> None:
    with pytest.raises(ValidationError, match=r"leave warmup_fraction = 0\.2 out"):
        TrainSettings(schedule="lilt", warmup_fraction=0.2)
    written = TrainSettings(schedule="lilt").model_dump()  # as a run writes it down, with nothing left out
    assert TrainSettings.model_validate(written).schedule == "lilt"


def test_every_field_says_what_it_is() -> None:
    for settings in (TrainSettings, LrFactors):
        assert [name for name, field in settings.model_fields.items() if not field.description] == []
