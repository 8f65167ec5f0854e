"""Numbers beyond all use: every whole number of a recipe at a billion, refused before anything is allocated for it."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from clasp.config.build import build_model
from clasp.config.recipe import read_recipe, recipe_keys
from clasp.models.tuning.methods import TUNING_METHODS
from clasp.types import UserError

BILLION = 1_000_000_000
# limits of pairs, steps and epochs, which nothing is allocated for; more than there are is as many as there are, or is
# refused where they are counted
COUNTS = {
    "data.max_pairs",
    "loss.negatives",
    "train.batch_size",
    "train.micro_batch",
    "train.max_steps",
    "train.seed",
    "train.evaluate_every",
    "train.log_every",
    "auto.steps",
}
# how a key is written where its value is not the number alone
WRITTEN = {
    "image.extra_layers": "[{}]",
    "text.extra_layers": "[{}]",
    "image.net.branch.before": "[{}]",
    "image.background": "[{}, 0, 0]",
    "data.augment.randaugment": "[{}, 7]",
}


def _holds_int(annotation: Any) -> bool:
    return annotation is int or any(map(_holds_int, get_args(annotation)))


def _whole_numbers() -> list[str]:
    """Every key whose value is, or holds, a whole number; ranks of sharing, which the nets limit, are below."""
    found = [key for key, kind in recipe_keys().items() if kind is not None and _holds_int(kind)]
    return [key for key in found if not (key.startswith("share.") and key not in ("share.patch", "share.context"))]


def _read(key: str, number: int | str) -> None:
    base = "heads"
    if ".net." in key or key.startswith("share."):
        base = "msclip/msclip-s-b32"
    elif key.startswith("auto."):
        base = "auto"
    value = WRITTEN.get(key, "{}").format(number)
    read_recipe(base, [f"{key}={value}"], budget={"steps": value} if key == "auto.steps" else None)


@pytest.mark.parametrize("key", _whole_numbers())
def test_a_whole_number_of_a_recipe_has_a_limit(key: str) -> None:
    if key in COUNTS:
        _read(key, BILLION)
    else:
        with pytest.raises(UserError, match="1000000000"):
            _read(key, BILLION)
    for more in ("1e30", str(10**400)):
        with pytest.raises(UserError, match=r"1e\+30|100000") as told:
            _read(key, more)
        assert len(str(told.value)) < 700, "the number is not written out"


TUNINGS = [
    *(
        f"{name}({option}={BILLION})"
        for name, row in TUNING_METHODS.items()
        for option, usual in row.defaults.items()
        if isinstance(usual, int)
    ),
    *(f"{name}(rank={BILLION})" for name, row in TUNING_METHODS.items() if row.passes_to_peft and name != "ia3"),
    f"lora(r={BILLION})",
    f"lora(rank_pattern={{'query': {BILLION}}})",
    f"oft(oft_block_size={BILLION})",
]


@pytest.mark.parametrize("spec", TUNINGS)
def test_what_tuning_adds_has_a_limit(spec: str) -> None:
    """A net on the meta device: peft allocates on the CPU, whatever the device of the net."""
    with pytest.raises(UserError, match=r"at most 384|1 to 100|has 6 blocks") as told:
        build_model(read_recipe("heads", ["text.tower=pip:minilm-l6", f'tune.text=["{spec}"]']), meta=True)
    assert str(BILLION) in str(told.value)


def test_the_highest_rank_and_reduction_are_taken() -> None:
    specs = '["lora(rank=384)", "adapters(reduction=384)"]'
    build_model(read_recipe("heads", ["text.tower=pip:minilm-l6", f"tune.text={specs}"]), meta=True)


SIZED = {
    "msclip/msclip-s-b32 share.attention={low-rank=1000000000}": "low-rank = 1000000000 has more weights",
    "msclip/clip-b32 image.net.layers=64 image.net.width=49152": r"weights of \[image.net\] take .* GB",
    "msclip/clip-b32 text.net.layers=64 text.net.width=65536": r"weights of \[text.net\] take .* GB",
    "heads head.init=random head.kind=mlp head.width=65536 head.hidden=1048576": "weights of the heads take .* GB",
    "heads text.max_tokens=513": "has positions for 512 tokens; at most 512",
    'heads text.max_tokens=400 tune.text=["prompts(200)"]': r"with 200 prompts: .* at most 312",
}


@pytest.mark.parametrize("typed", SIZED)
def test_what_does_not_fit_is_refused_before_it_is_made(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clasp.config.memory_check.free_bytes", lambda device: 10**9)
    base, *overrides = typed.split()
    with pytest.raises(UserError, match=SIZED[typed]):
        build_model(read_recipe(base, overrides), meta="take" not in SIZED[typed])
